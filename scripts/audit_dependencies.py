"""Known vulnerabilities of the installed packages, where pip-audit and a connection are at hand;
else one line says why they were not looked for. Used by `make check`."""

import importlib.util
import subprocess
import sys

SECONDS = 20
NO_ANSWER = ("ConnectionError", "Max retries", "timed out", "ServiceError", "resolve")


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
    if ended.returncode and any(word in ended.stderr for word in NO_ANSWER):
        print("dependency audit skipped: the advisories cannot be reached")
        return 0
    print(ended.stdout + ended.stderr)
    return 1 if ended.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
