"""Known vulnerabilities of the installed packages, where pip-audit and a connection are at hand;
else one line says why they were not looked for. Used by `make check`."""

import importlib.util
import subprocess
import sys

SECONDS = 20


def main() -> int:
    """Status 1 only when a vulnerability was found."""
    if importlib.util.find_spec("pip_audit") is None:
        print("dependency audit skipped: pip-audit is not installed (pip install pip-audit)")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner=off", "--timeout=5"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"dependency audit skipped: no answer within {SECONDS} seconds")
        return 0
    found = ended.returncode != 0 and "known vulnerabilit" in ended.stderr
    if ended.returncode and not found:  # most likely the advisories cannot be reached
        print(f"dependency audit skipped: {ended.stderr.strip().splitlines()[-1:]}")
        return 0
    print(ended.stdout + ended.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
