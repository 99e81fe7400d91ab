"""Ten thousand spoilt concept files, in a process of their own for the audit hook."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability.fuzz import MEGABYTES, corpus, seed_files
from tests.reliability.mutations import KINDS, mutant

ROOT = Path(__file__).parents[2]


def test_ten_thousand_spoilt_files_are_refused_or_read_as_what_they_say(record_property):
    command = [sys.executable, "-m", "tests.reliability.fuzz", "--count", "10000", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = json.loads(ended.stdout)
    assert found["failures"] == [] and ended.returncode == 0
    assert found["files"] == 10_000 + found["corpus"] and set(KINDS) <= set(found["kinds"])
    assert found["refused"] > 8000 and found["same"] > 100 and found["forged_valid"] > 50
    assert len(found["errors"]) >= 3
    record_property("9 files mutated", found["files"])
    record_property("9 mutations refused", found["refused"])
    record_property("9 read as the same concept", found["same"])
    record_property("9 valid forgeries read as they say", found["forged_valid"])
    record_property("9 seconds for the slowest", round(found["slowest"], 3))
    record_property(f"9 MB for the largest, of {MEGABYTES}", round(found["megabytes"], 1))


def test_a_seed_gives_the_same_files(tmp_path):
    seeds = seed_files(tmp_path)
    first, again = ([mutant(random.Random(f"0 {k}"), seeds) for k in range(50)] for _ in range(2))
    assert first == again and len({one.content for one in first}) > 40


def test_the_corpus_has_inputs_that_failed():
    assert len(list(corpus())) >= 3


FAULTS = (
    "another error", "starts a process", "opens a socket", "runs a text", "writes", "takes memory",
    "takes time",
)  # fmt: skip


@pytest.mark.parametrize(
    "fault", ["accepts all", *(pytest.param(f, marks=pytest.mark.reliability) for f in FAULTS)]
)
def test_a_reader_with_a_fault_is_found_out(fault):
    """The run above could not fail otherwise."""
    ended = run_faulty(fault, "print(len(fuzz.fuzz(20, 0).failures))\n")
    assert int(ended.stdout) > 2, ended.stderr


@pytest.mark.reliability
def test_the_open_ended_search_ends_with_the_time_and_keeps_what_fails(tmp_path):
    command = [sys.executable, "-m", "tests.reliability.open_ended", "--minutes", "0.05"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0 and "seed 0: 1000 files" in ended.stdout, ended.stderr
    code = (
        "from tests.reliability import open_ended\n"
        f"sys.argv[1:] = ['--keep', {str(tmp_path)!r}]\n"
        "sys.exit(open_ended.main())\n"
    )
    ended = run_faulty("another error", code)
    (kept,) = tmp_path.iterdir()
    assert ended.returncode == 1 and "KeyError: 1" in ended.stdout and kept.suffix == ".bin"


def run_faulty(fault: str, then: str) -> subprocess.CompletedProcess:
    """A program whose reader has a fault from the 510th file on."""
    code = (
        "import socket, subprocess, sys, time\n"
        "from tests.reliability import fuzz\n"
        "good, fault = fuzz.read_concepts, sys.argv[1]\n"
        "def work_for(seconds):\n"
        "    ends = time.process_time() + seconds\n"
        "    while time.process_time() < ends: pass\n"
        "def faulty(path, kept=[]):\n"
        "    kept.append(path)\n"
        "    if len(kept) < 510: return good(path)\n"
        "    if fault == 'another error': raise KeyError(1)\n"
        "    if fault == 'starts a process': subprocess.run(['true']); return good(path)\n"
        "    if fault == 'opens a socket': socket.socket().close(); return good(path)\n"
        "    if fault == 'runs a text': exec('1'); return good(path)\n"
        "    if fault == 'writes': open(path, 'ab').close(); return good(path)\n"
        "    if fault == 'takes memory': b'x' * (80 << 20); return good(path)\n"
        "    if fault == 'takes time': work_for(fuzz.SECONDS + 0.2); return good(path)\n"
        "    return fuzz.ConceptSet(())\n"
        "fuzz.read_concepts = faulty\n"
    )
    command = [sys.executable, "-c", code + then, fault]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
