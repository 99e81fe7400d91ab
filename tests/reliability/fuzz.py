"""Spoilt concept files, so many of them: `python -m tests.reliability.fuzz --count N --seed S`.

Each is read under an audit hook. It must be refused with a typed error, or be read as what it
says; within a second of the processor and 64 MB, without running, starting, connecting to or
writing anything. What fails is kept in the corpus, which every run replays first.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbora_diffusion.core.concept import encode_concept, sealed, write_concept
from sbora_diffusion.core.concept_set import ConceptSet, read_concepts, write_concept_set
from sbora_diffusion.core.errors import SboraError
from sbora_diffusion.core.storage import raw_bytes
from tests.core.concept_examples import make_concept
from tests.reliability.forging import canonical, taken_apart
from tests.reliability.mutations import Mutant, mutant

CORPUS = Path(__file__).parent / "corpus"
MEMORY = Path("/dev/shm")  # a file that is cut off and written again is slow on a disk
SECONDS, MEGABYTES, WARM_UP = 1.0, 64, 500
FORBIDDEN = ("exec", "compile", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn")


@dataclass
class Figures:
    """What a run found; `failures` holds the kind and reason of each, and is to stay empty."""

    files: int = 0
    refused: int = 0
    same: int = 0
    forged_valid: int = 0
    slowest: float = 0.0
    megabytes: float = 0.0
    corpus: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[str, str]] = field(default_factory=list)


class Watch:
    """Notes what no reading of a file may do; cannot be taken off again."""

    def __init__(self) -> None:
        self.armed, self.seen = False, []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and (
            event in FORBIDDEN
            or event.startswith(("subprocess.", "socket."))
            or (event == "open" and _writes(arguments))
        ):
            self.seen.append(f"{event} {arguments!r}"[:300])

    def taken(self) -> list[str]:
        found, self.seen = self.seen, []
        return found


def _writes(arguments: tuple[Any, ...]) -> bool:
    return bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def peak_megabytes() -> float:
    """The most memory of this process since the last reset. Not `getrusage`'s: that counts from
    before the program was started, so that a large parent process hides everything."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Reader:
    """Gives file contents to the package, one after another, and judges what it does with them."""

    def __init__(self, folder: Path, seeds: list[bytes], figures: Figures) -> None:
        self.path, self.figures = folder / "c.safetensors", figures
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT)
        self.peak = os.open("/proc/self/clear_refs", os.O_WRONLY)
        self.watch, self.watching = Watch(), False
        self.own = {self.accepted(seed) for seed in seeds}

    def accepted(self, content: bytes) -> str:
        self.put(content)
        return _meaning(read_concepts(self.path))

    def put(self, content: bytes) -> None:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, content, 0)

    def memory(self) -> float:
        """The most memory since the last reset, in MB; what is in use becomes the new peak."""
        most = peak_megabytes()
        os.write(self.peak, b"5")
        return most

    def judge(self, spoilt: Mutant) -> None:
        """Read one file; append to `failures` what must not be."""
        self.put(spoilt.content)
        self.memory()
        figures, before, began = self.figures, self.memory(), time.process_time()
        self.watch.armed = self.watching
        reason = self._outcome(spoilt)
        self.watch.armed = False
        seconds, grown = time.process_time() - began, self.memory() - before
        figures.files += 1
        figures.kinds[spoilt.kind] += 1
        figures.slowest = max(figures.slowest, seconds)
        figures.megabytes = max(figures.megabytes, grown)
        if seen := self.watch.taken():
            reason = f"did {seen[0]}"
        elif seconds > SECONDS:
            reason = f"took {seconds:.1f} s"
        elif grown > MEGABYTES:
            reason = f"took {grown:.0f} MB"
        if reason:
            figures.failures.append((spoilt.kind, reason))

    def warm_up(self, seeds: list[bytes]) -> None:
        """What is imported at first use is no deed of a file: only then begin to watch."""
        for number in range(WARM_UP):
            self.judge(mutant(random.Random(f"warm {number}"), seeds))
        failures = self.figures.failures[:]
        vars(self.figures).update(vars(Figures(failures=failures)))
        self.watching = True

    def _outcome(self, spoilt: Mutant) -> str:
        try:
            found = read_concepts(self.path)
        except SboraError as error:
            self.figures.refused += 1
            self.figures.errors[type(error).__name__] += 1
            return "" if "\n" not in str(error) and error.remedy else f"unclear: {error}"
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {error} in {where.filename}:{where.lineno}"[:300]
        return self._meant(spoilt, found)

    def _meant(self, spoilt: Mutant, found: ConceptSet) -> str:
        if spoilt.wrong:
            return "accepted, though it contradicts the format"
        if not spoilt.forged:
            self.figures.same += 1
            return "" if _meaning(found) in self.own else "accepted as another concept"
        self.figures.forged_valid += 1
        return _ignored(found, spoilt.content)


def _meaning(found: ConceptSet) -> str:
    """All that a file says, in the words of a file; equal exactly when the files mean the same."""
    whole = [found.allow_overlap]
    for concept, weight in found.concepts:
        tensors, document = encode_concept(concept)
        values = {key: raw_bytes(tensors[key]).hex() for key in sorted(tensors)}
        whole += [weight, document, values]
    return json.dumps(whole, sort_keys=True)


def _ignored(found: ConceptSet, content: bytes) -> str:
    """What an accepted forgery says and the reader did not take up, "" if nothing."""
    parts = taken_apart(content)
    said = {document["digest"]: document for document in parts.documents}
    for concept, _ in found.concepts:
        _, document = encode_concept(concept)
        own = said.pop(concept.meta.digest)
        for key, value in own.items():
            if key != "digest" and canonical(document[key]) != canonical(value):
                return f"accepted with {key} = {value!r} read as {document[key]!r}"
    return "accepted with a concept left out" if said else ""


@contextmanager
def temporary_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        yield Path(folder)


def seed_files(folder: Path) -> list[bytes]:
    """Valid files: an FA and an FB concept, and a set of three."""
    robot, row = make_concept(), make_concept("row", "fb", slot=1)
    fox = make_concept("fox", slot=1)
    write_concept(folder / "fa", robot)
    write_concept(folder / "fb", row)
    write_concept_set(
        folder / "set", [(sealed(robot), 0.5), (sealed(row), 1.0), (sealed(fox), 2.0)]
    )
    return [(folder / name).read_bytes() for name in ("fa", "fb", "set")]


def corpus(folder: Path = CORPUS) -> Iterator[Mutant]:
    """Inputs that once failed; the name begins with `wrong` or `forged` if they are that."""
    for file in sorted(folder.glob("*.bin")):
        words = file.stem.split("-")
        yield Mutant(file.stem, file.read_bytes(), "forged" in words, "wrong" in words)


def fuzz(count: int, seed: int, first: int = 0, keep: Path | None = None) -> Figures:
    """Judge `count` spoilt files after the corpus; failures are written to `keep`.

    Args:
        first: number of the first file; a seed and a number give one file.
    """
    figures = Figures()
    with temporary_folder() as folder:
        seeds = seed_files(folder)
        reader = Reader(folder, seeds, figures)
        reader.warm_up(seeds)
        for spoilt in corpus():
            reader.judge(spoilt)
            figures.corpus += 1
        kept: list[Mutant] = []
        for number in range(first, first + count):
            before = len(figures.failures)
            spoilt = mutant(random.Random(f"{seed} {number}"), seeds)
            reader.judge(spoilt)
            if len(figures.failures) > before:
                kept.append(spoilt)
    keep_inputs(kept, keep)
    return figures


def keep_inputs(spoilt: list[Mutant], folder: Path | None) -> None:
    """One file of each kind is enough to begin with."""
    for one in {one.kind: one for one in spoilt}.values() if folder else ():
        marks = [*(["wrong"] if one.wrong else []), *(["forged"] if one.forged else []), one.kind]
        (folder / f"{'-'.join(marks)}.bin").write_bytes(one.content)


def main() -> int:
    """Print the figures; status 1 if there are failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for files that fail", default=None)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    began = time.monotonic()
    figures = fuzz(options.count, options.seed, keep=options.keep)
    found = {**vars(figures), "per_second": round(options.count / (time.monotonic() - began))}
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{key}: {value}" for key, value in found.items()))
    return 1 if figures.failures else 0


if __name__ == "__main__":
    sys.exit(main())
