"""A process that changes a library until it has done its work or is killed.

`python tests/library_writer.py LIBRARY WIDTH WORKER COUNT DIE_AFTER` says on stdout what it is
about to do and what is done; after DIE_AFTER changes it dies inside the next transaction.
"""

import os
import random
import signal
import sqlite3
import sys
from pathlib import Path

from sbora_diffusion import library as module
from sbora_diffusion.library import Library

BASE, VARIANT = "pocket-1", "fa"


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def reserve(library: Library, name: str, rank: int, width: int) -> None:
    got = library.reserve(BASE, VARIANT, name, rank, {"unet.narrow": width, "unet.wide": 2 * width})
    say("reserved", name, got.start, got.stop)


def die_inside_the_transaction() -> None:
    """From now on the process kills itself after its writes and before they are committed."""
    original = module.transaction

    class Dying:
        def __init__(self, path: Path):
            self.inner = original(path)

        def __enter__(self) -> sqlite3.Connection:
            return self.inner.__enter__()

        def __exit__(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    module.transaction = Dying


def main(path: str, width: int, worker: int, count: int, die_after: int) -> None:
    library, random_ = Library(path), random.Random(worker)
    mine: list[str] = []
    for k in range(count):
        if k == die_after:
            die_inside_the_transaction()
        if mine and random_.random() < 0.2:
            name = mine.pop(random_.randrange(len(mine)))
            say("removing", name)
            library.remove(name)
            say("removed", name)
        elif mine and random_.random() < 0.2:
            say("recording", mine[-1])
            library.record(BASE, VARIANT, mine[-1], f"{mine[-1]}.safetensors", "d" * 64, "<x>")
            say("recorded", mine[-1])
        else:
            name = f"w{worker}_{k}"
            say("reserving", name)
            reserve(library, name, random_.choice((4, 8)), width)
            mine.append(name)
    say("done")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
