"""`docs/errors.md`: up to date, and every error says what to do."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def without_remedy(page: str) -> list[str]:
    """Rows with neither a remedy nor, in the problem itself, what a value must be."""
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    parts = {row: row.strip("| ").split(" | ") for row in rows}
    return [row for row, said in parts.items() if len(said) < 3 and " must be " not in row]


def test_the_page_of_errors_is_up_to_date():
    command = [sys.executable, "scripts/list_errors.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == 0, "run scripts/list_errors.py"


def test_every_error_says_what_to_do():
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert without_remedy(page) == []


def test_an_error_without_a_remedy_is_found():
    assert without_remedy("| `a.py` | … is wrong |  |") == ["| `a.py` | … is wrong |  |"]
    assert not without_remedy("| `a.py` | … must be 1, got … |  |\n| `b.py` | … is | mend it |")
