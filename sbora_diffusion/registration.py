"""SBoRA's place among PEFT's tuners, taken when PEFT itself is imported.

So that `import sbora_diffusion` is enough for `PeftModel.from_pretrained` to know its adapters, and
costs nothing, as for the help of a command, where PEFT is never used.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

PEFT, TUNERS = "peft", "sbora_diffusion.core.tuner"


def register_with_peft() -> None:
    """Register the tuners now if PEFT is there, else as soon as it is imported."""
    if PEFT in sys.modules:
        import_module(TUNERS)
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())


class _PeftFinder(MetaPathFinder):
    """Finds PEFT where it lies, with a loader that registers afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == PEFT else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(TUNERS)

    def __getattr__(self, name: str) -> Any:  # what readers of resources and sources ask for
        return getattr(self._loader, name)
