"""Known vulnerabilities of the installed packages, where pip-audit and a connection are at hand;
else one line says why they were not looked for. Used by `make check`."""

import importlib.util
import json
import subprocess
import sys

SECONDS = 120


def main() -> int:
    """Status 1 only when a vulnerability was found."""
    if importlib.util.find_spec("pip_audit") is None:
        print("dependency audit skipped: pip-audit is not installed (pip install pip-audit)")
        return 0
    options = ["--progress-spinner=off", "--timeout=5", "--format=json"]
    command = [sys.executable, "-m", "pip_audit", *options]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        print(f"dependency audit skipped: no answer within {SECONDS} seconds")
        return 0
    try:
        packages = json.loads(ended.stdout)["dependencies"]
    except ValueError:  # most likely the advisories cannot be reached
        print(f"dependency audit skipped: {ended.stderr.strip().splitlines()[-1:]}")
        return 0
    asked = [package for package in packages if "vulns" in package]
    if not asked:  # an index without advisories
        print(f"dependency audit skipped: advisories for none of {len(packages)} packages")
        return 0
    found = [f"{p['name']} {p['version']}: {v['id']}" for p in asked for v in p["vulns"]]
    print(f"dependency audit: {len(asked)} of {len(packages)} packages, {len(found)} advisories")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
