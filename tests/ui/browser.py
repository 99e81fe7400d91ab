"""The browser that the tests drive: `python -m tests.ui.browser` installs one where none is."""

import contextlib
import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ARGUMENTS = (
    "--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)  # fmt: skip
"""A camera that shows a test pattern, and that nobody has to allow."""
NEEDED = "make test-ui needs a browser: apt-get install chromium, or set CHROMIUM to its path"


def find() -> str | None:
    """Path of a Chromium, `$CHROMIUM` first."""
    own = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [own, *NAMES] if own else NAMES)), None)


def install() -> None:
    """By Debian's package manager, as root."""
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        subprocess.run(["apt-get", "-qq", *command], check=True, stdout=subprocess.DEVNULL)


def main() -> int:
    if find():
        return 0
    if shutil.which("apt-get") and os.geteuid() == 0:
        with contextlib.suppress(subprocess.CalledProcessError):
            install()
    if find():
        return 0
    print(NEEDED, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
