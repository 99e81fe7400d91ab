"""Write `docs/errors.md` from the code: every typed error, and what each place that raises it says.

python scripts/list_errors.py            # --check: status 1 if the page is out of date
"""

import ast
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from sbora_diffusion.core import errors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "errors.md"
HEAD = """# Errors
Written from the code by `scripts/list_errors.py`. Every error says in one line what was found, and
after a semicolon what to do; `sbora` prints it and ends with status 2. `…` stands for what differs.
"""


def page() -> str:
    """The whole page."""
    classes = {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.SboraError)
    }
    sites: dict[str, set[tuple[str, str, str]]] = {name: set() for name in classes}
    for path in sorted((ROOT / "sbora_diffusion").rglob("*.py")):
        source = ast.parse(path.read_text(encoding="utf-8"))
        place = path.relative_to(ROOT / "sbora_diffusion").as_posix()
        for name, problem, remedy in raised(source, set(classes)):
            sites[name].add((place, problem, remedy))
    parts = [HEAD]
    for name, value in classes.items():
        parts.append(f"## {name}\n{(inspect.getdoc(value) or '').split(chr(10))[0]}\n")
        if sites[name]:
            rows = [f"| `{place}` | {says} | {do} |" for place, says, do in sorted(sites[name])]
            table = ["| where | what it says | what to do |", "|---|---|---|", *rows]
            parts.append("\n".join(table) + "\n")
    return "\n".join(parts)


def raised(source: ast.Module, names: set[str]) -> Iterator[tuple[str, str, str]]:
    """Class, problem and remedy of each error that a module makes."""
    constants = {
        target.id: node.value
        for node in source.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(source):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id in names and node.args:
            said = [text(argument, constants) for argument in node.args[:2]]
            said += [text(k.value, constants) for k in node.keywords if k.arg == "remedy"]
            yield node.func.id, said[0], said[1] if len(said) > 1 else ""


def text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """The message as far as the source knows it."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, constants) for part in node.values)
    if isinstance(node, ast.Name) and node.id in constants:
        return text(constants[node.id], {})
    return "…"


def main() -> int:
    """Write the page, or only look."""
    if "--check" in sys.argv[1:]:
        return int(not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
