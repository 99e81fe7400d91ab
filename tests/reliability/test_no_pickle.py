"""Nothing in the package unpickles objects, and content decides what a file is, not its name."""

import ast
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sbora_diffusion
from sbora_diffusion.core.errors import FormatError
from sbora_diffusion.diffusion.bases import POCKET, load_base

PACKAGE = Path(sbora_diffusion.__file__).parent
SCRIPTS = Path(__file__).parents[2] / "scripts"
MODULES = {"pickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
UNPICKLING = ("torch.load", "torch.serialization.load", "torch.hub.load_state_dict_from_url")
"""Tables of tensors alone, if they are told so."""
NEVER = (
    "torch.jit.load", "torch.hub.load", "torch.package", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.FileSystemReader",
    "torch.serialization.add_safe_globals", "torch.serialization.safe_globals",
)  # fmt: skip
WEIGHTS_ONLY = {"core/published.py"}
"""Where `torch.load` stands: the import of published SBoRA checkpoints. The other exception, the HF
Trainer's own state, is loaded by Trainer, see tests/core/llm/test_training.py."""


def unpicklings(source: str) -> Iterator[tuple[str, bool]]:
    """Every place where a source could load a pickle: in its own words, and whether tensors alone
    can come of it."""
    tree = ast.parse(source)
    names = imported(tree)
    yield from ((name, False) for name in names.values() if name.split(".")[0] in MODULES)
    safe: set[ast.AST] = set()
    for node in ast.walk(tree):  # a call comes before the name that it calls
        name = full_name(node, names)
        if isinstance(node, ast.Call):
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if options.get("weights_only") == "True":
                safe.add(node.func)
            if unsafe_options(options):
                yield ast.unparse(node), False
        elif name in UNPICKLING:
            yield name, node in safe
        elif name.startswith(NEVER) or name.endswith((".read_pickle", ".load_state")):
            yield name, False


def imported(tree: ast.Module) -> dict[str, str]:
    """Name in a module → what it stands for."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            shown = [(a.asname or a.name.partition(".")[0], a) for a in node.names]
            found |= {name: a.name if a.asname else name for name, a in shown}
    return found


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """ "torch.load" for `load` after `from torch import load`; "" for what is no name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    return f"{full_name(node.value, names)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def unsafe_options(options: dict[str | None, str]) -> bool:
    return (
        options.get("allow_pickle", "False") != "False"
        or options.get("use_safetensors") == "False"
        or options.get("trust_remote_code", "False") != "False"
    )


def scanned(folder: Path) -> tuple[int, set[str], dict[str, list[str]]]:
    """Modules of a folder: how many; those that load tensors; what others load, by module."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    found = {key: list(unpicklings(path.read_text("utf-8"))) for key, path in paths.items()}
    tensors = {key for key, places in found.items() if any(safe for _, safe in places)}
    unsafe = {key: [name for name, safe in found[key] if not safe] for key in found}
    return len(paths), tensors, {key: names for key, names in unsafe.items() if names}


def test_no_module_loads_a_pickle(record_property):
    count, tensors, unsafe = scanned(PACKAGE)
    assert (tensors, unsafe) == (WEIGHTS_ONLY, {}) and count > 200
    record_property("10 modules without unpickling", count)
    record_property("10 modules with weights_only=True", len(tensors))
    count, tensors, unsafe = scanned(SCRIPTS)
    assert (tensors, unsafe) == (set(), {})
    record_property("10 scripts without unpickling", count)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "torch.load(x, weights_only=safe)",
        "from torch import load; load(x)",
        "import torch as t; t.load(x)",
        "from torch.serialization import load as read; read(x)",
        "partial(torch.load, x)",
        "torch.jit.load(x)",
        "import torch.distributed.checkpoint as dcp; dcp.load(x)",
        "from torch.serialization import safe_globals; safe_globals([x])",
        "accelerator.load_state(x)",
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "np.load(x, allow_pickle=True)",
        "pd.read_pickle(x)",
        "load(x, use_safetensors=False)",
        "load(x, trust_remote_code=trusted)",
    ],
)
def test_that_search_finds_every_way_to_load_one(source):
    assert {safe for _, safe in unpicklings(source)} == {False}
    assert list(unpicklings("torch.load(x, weights_only=True)")) == [("torch.load", True)]
    assert not list(unpicklings("import numpy as np; np.load(x); json.load(x); import pickletools"))


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
@pytest.mark.parametrize("kind", ["pickle", "checkpoint", "bin"])
def test_a_model_folder_with_pickles_is_refused_and_nothing_runs(tmp_path, part, kind):
    folder, canary = tmp_path / "base", tmp_path / "canary"
    shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("examples", "clip"))
    weights = folder / f"{part}.safetensors"
    weights.unlink()
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(Runs(canary)))
    elif kind == "checkpoint":
        torch.save({"a": Runs(canary)}, weights)
    else:
        name = "pytorch_model.bin" if "text" in part else "diffusion_pytorch_model.bin"
        torch.save({"a": torch.zeros(1)}, weights.with_name(name))
    with pytest.raises(FormatError, match="cannot be read"):
        load_base(str(folder), "cpu")
    assert not canary.exists()


def test_a_checkpoint_named_safetensors_is_refused_as_a_base(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"a": Runs(canary)}, tmp_path / "m.safetensors")
    with pytest.raises(FormatError, match="cannot be read as a checkpoint"):
        load_base(str(tmp_path / "m.safetensors"), "cpu")
    assert not canary.exists()
