import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_of_errors_is_up_to_date():
    command = [sys.executable, "scripts/list_errors.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    assert done.returncode == 0, "run scripts/list_errors.py"
