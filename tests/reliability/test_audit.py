"""The dependency audit of `make check`: it fails for a vulnerability and for nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "audit_dependencies.py"
FINE = {"name": "fine", "version": "1", "vulns": []}
BAD = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}
UNKNOWN = {"name": "unknown", "skip_reason": "not found"}


def answer(*packages: dict[str, object], status: int = 0) -> str:
    """A program that answers as pip-audit does."""
    return f"print({json.dumps({'dependencies': packages})!r})\nsys.exit({status})"


def audited(tmp_path: Path, program: str) -> subprocess.CompletedProcess:
    """The audit with a pip-audit that is this program."""
    (tmp_path / "pip_audit.py").write_text(f"import sys\n{program}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (answer(FINE, BAD, status=1), 1, "2 packages, 2 advisories\nbad 2: CVE-1\nbad 2: CVE-2"),
        ('sys.exit("requests.exceptions.ProxyError: no connection")', 0, "skipped: .*ProxyError"),
        (answer(UNKNOWN, UNKNOWN), 0, "skipped: advisories for none of 2 packages"),
        (answer(FINE, UNKNOWN), 0, "1 of 2 packages, 0 advisories"),
    ],
    ids=["found", "offline", "unknown", "clean"],
)
def test_only_a_vulnerability_fails_it(tmp_path, program, status, said):
    ended = audited(tmp_path, program)
    assert ended.returncode == status and re.search(said, ended.stdout), ended.stderr
