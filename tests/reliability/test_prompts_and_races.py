"""Prompts that nobody expects; sixteen processes at one library; another hash seed."""

import hashlib
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.diffusion.pipeline import ConceptPipeline
from sbora_diffusion.diffusion.prompts import spelled
from sbora_diffusion.pictures import words_cut_off
from tests.diffusion.helpers import strong_concept
from tests.test_library_race import (  # noqa: F401
    Writer,
    assert_as_told,
    assert_disjoint,
    library,
    start,
    told,
)

PROMPTS = {
    "empty": "",
    "blank": " \n\t ",
    "long": "a photo of a bear " * 100,
    "emoji": "\U0001f9f8 on the beach \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "right to left": "\u05d3\u05d5\u05d1 \u202e<plushbear>\u202c",
    "NUL": "a photo\0of <plushbear>\0",
    "one megabyte": "bear " * 200_000,
    "one word of a megabyte": "b" * 1_000_000,
    "repeated token": "<plushbear> " * 40,
    "missing token": "a photo of <nobody>",
    "half a token": "<plushbear <<plushbear>> plushbear>",
}


@pytest.fixture(scope="module")
def live(pocket, tiny_concepts):
    pipeline = ConceptPipeline(pocket)
    pipeline.add(read_concept(tiny_concepts["plushbear"]))
    yield pipeline
    pipeline.remove("plushbear")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.reliability if "megabyte" in n else ()) for n in PROMPTS],
)
def test_no_prompt_breaks_the_drawing_and_truncation_is_reported(live, name, record_property):
    prompt = PROMPTS[name]
    (picture,) = live.generate(prompt, steps=1)
    assert picture.size == (128, 128)
    cut = words_cut_off(live.base, spelled(prompt))
    too_long = name in ("long", "one megabyte", "one word of a megabyte", "repeated token")
    assert bool(cut) == too_long
    record_property("20 prompts drawn", 1)


def test_a_concept_named_like_a_word_of_the_vocabulary_is_not_that_word(live, pocket, tmp_path):
    (plain,) = live.generate("a photo of a bear", steps=1)
    live.add(strong_concept(pocket, tmp_path, "bear", slot=5))
    try:
        assert "bear" in live.unmentioned("a photo of a bear")
        assert "bear" not in live.unmentioned("a photo of a <bear>")
    finally:
        live.remove("bear")
    assert live.generate("a photo of a bear", steps=1)[0].tobytes() == plain.tobytes()


@pytest.mark.reliability
def test_sixteen_processes_of_two_hundred_changes_and_random_kills(
    library,  # noqa: F811
    start,  # noqa: F811
    record_property,
):
    rng = random.Random(1)
    writers = [start(worker, 200, width=100_000) for worker in range(16)]
    victims = rng.sample(writers, 6)
    moments = [rng.randrange(1, 200) for _ in victims]
    with ThreadPoolExecutor(len(victims)) as pool:
        list(pool.map(Writer.kill_after, victims, moments))
    reports = [told(writer.read()) for writer in writers]
    entries = library.concepts()
    assert_disjoint(entries)
    assert_as_told(entries, reports)
    done = sum(line.startswith("reserved") for writer in writers for line in writer.lines)
    killed = sum(w.lines[-1:] != ["done"] for w in writers)
    assert done > 10 * 200 * 0.5 and killed > len(victims) / 2
    record_property("13 processes", len(writers))
    record_property("13 of them killed", killed)
    record_property("13 allocations made", done)
    record_property("13 ranges owned at the end, disjoint", len(entries))


@pytest.mark.reliability
def test_training_and_drawing_do_not_depend_on_the_hash_seed(tmp_path, record_property):
    """Each in processes of its own: same concept file, same pixels."""
    subject = Path(__file__).parents[2] / "concepts" / "plushbear"
    tiny = [part for pair in ("steps=2", "copies=1", "batch_size=1", "preservation=0")
            for part in ("-s", pair)]  # fmt: skip
    found = []
    for seed in ("0", "1", "4294967295"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "SBORA_LIBRARY": str(folder / "l")}
        sbora = [sys.executable, "-m", "sbora_diffusion"]
        draw = ["generate", "a <plushbear>", "--concept", "plushbear.safetensors", "--steps", "2"]
        for command in (["train", str(subject), *tiny], [*draw, "-o", "a.png"]):
            subprocess.run([*sbora, *command, "--device", "cpu"], cwd=folder, env=environment,
                           check=True, capture_output=True, timeout=300)  # fmt: skip
        files = ("plushbear.safetensors", "a.png")
        found.append([hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files])
    assert found[0] == found[1] == found[2]
    record_property("14 hash seeds with equal files and pixels", len(found))
