"""The dependency audit of `make check`: it fails for a vulnerability and for nothing else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit_dependencies.py"
FOUND = 'sys.exit("Found 2 known vulnerabilities in 1 package")'
OFFLINE = 'sys.exit("requests.exceptions.ProxyError: no connection")'


def audited(tmp_path: Path, program: str) -> subprocess.CompletedProcess:
    """The audit with a pip-audit that is this program."""
    (tmp_path / "pip_audit.py").write_text(f"import sys\n{program}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [(FOUND, 1, "2 known vulnerabilities"), (OFFLINE, 0, "skipped: .*ProxyError"),
     ('print("No known vulnerabilities found", file=sys.stderr)', 0, "No known")],
    ids=["found", "offline", "clean"],
)  # fmt: skip
def test_only_a_vulnerability_fails_it(tmp_path, program, status, said):
    ended = audited(tmp_path, program)
    assert ended.returncode == status and re.search(said, ended.stdout), ended.stderr
