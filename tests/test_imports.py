"""Imports point one way: core knows neither diffusers nor sbora_diffusion.diffusion."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import sbora_diffusion

PACKAGE = Path(sbora_diffusion.__file__).parent
FORBIDDEN = ("diffusers", "sbora_diffusion.diffusion")


def modules_of(package: Path) -> list[str]:
    """Dotted names of all modules of a package that lies in a folder of its top-level package."""
    root = package.parent if package.name != "core" else package.parents[1]
    files = sorted(package.rglob("*.py"))
    return [".".join(f.relative_to(root).with_suffix("").parts) for f in files]


def imports_under_a_ban(root: Path, modules: list[str]) -> subprocess.CompletedProcess:
    """Import the modules in a fresh process in which the forbidden packages cannot be imported."""
    program = (
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({FORBIDDEN!r}))\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )


def forbidden_imports(source: str) -> list[str]:
    """Every import of a forbidden package in a source text, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [n for n in names if any(f"{n}.".startswith(f"{package}.") for package in FORBIDDEN)]


def test_core_can_be_imported_where_diffusers_cannot():
    modules = modules_of(PACKAGE / "core")
    assert len(modules) >= 12 and "sbora_diffusion.core.tuner.layer" in modules
    assert "sbora_diffusion.core.llm.training" in modules
    if importlib.util.find_spec("triton") is None:  # as on macOS
        modules.remove("sbora_diffusion.core.kernels")
    done = imports_under_a_ban(PACKAGE.parent, modules)
    assert done.returncode == 0, done.stderr


def test_triton_is_imported_where_kernels_run_alone():
    program = (
        "import sys, torch\n"
        "from sbora_diffusion.core.strips import Strips\n"
        "before = 'triton' in sys.modules\n"
        "many, at = [torch.zeros(2, 2)] * 2, [torch.tensor([0])] * 2\n"
        "Strips(0, many, at).read()\n"
        "assert 'sbora_diffusion.core.kernels' not in sys.modules\n"
        "assert ('triton' in sys.modules) == before\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_that_check_fails_for_a_module_that_imports_them(tmp_path):
    for number, statement in enumerate(("import diffusers", "import diffusers.utils")):
        package = tmp_path / f"bad{number}"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "guilty.py").write_text(statement + "\n")
        done = imports_under_a_ban(tmp_path, modules_of(package))
        assert done.returncode == 1 and "diffusers" in done.stderr


def test_no_source_of_core_imports_them_even_inside_a_function():
    for file in sorted((PACKAGE / "core").rglob("*.py")):
        assert forbidden_imports(file.read_text(encoding="utf-8")) == [], file


def test_that_search_finds_every_way_to_write_an_import():
    guilty = (
        "import diffusers",
        "import diffusers.utils as u",
        "from diffusers import UNet2DConditionModel",
        "from sbora_diffusion import diffusion",
        "def f():\n    from sbora_diffusion.diffusion.bases import load_base",
    )
    assert all(forbidden_imports(source) for source in guilty)
    assert forbidden_imports("import diffusers_like\nfrom sbora_diffusion.core import errors") == []
