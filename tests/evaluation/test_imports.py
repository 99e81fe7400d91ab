"""The evaluation package knows no diffusion model, so that anything can be judged with it."""

import ast

from tests.test_imports import PACKAGE, forbidden_imports

FILES = sorted((PACKAGE / "evaluation").rglob("*.py"))


def own_imports(source: str) -> set[str]:
    """Modules of this project that a source imports, inside functions too."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if (node.module or "").startswith("sbora_diffusion")}


def test_it_imports_neither_diffusers_nor_what_stands_on_it():
    assert {"features.py", "metrics.py"} <= {file.name for file in FILES}
    for file in FILES:
        source = file.read_text(encoding="utf-8")
        assert forbidden_imports(source) == [], file
        below = ("sbora_diffusion.core.", "sbora_diffusion.evaluation.")
        assert all(module.startswith(below) for module in own_imports(source)), file


def test_that_search_finds_an_import_inside_a_function():
    guilty = "def f():\n    from sbora_diffusion.alignment import score"
    assert own_imports(guilty) == {"sbora_diffusion.alignment"}
