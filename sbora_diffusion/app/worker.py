"""A worker process: one `sbora` command that ends in order when the app that started it is gone."""

import os
import signal
import sys
import threading

from sbora_diffusion import cli


def main() -> None:
    """Run the command of the arguments; its standard input is a pipe that the app holds open."""
    # A shell that starts the app in the background lets its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_with_the_app, daemon=True).start()
    cli.main(sys.argv[1:])


def _end_with_the_app() -> None:
    # Not sys.stdin: its lock would be held by this thread when the interpreter ends.
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
