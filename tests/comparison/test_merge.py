"""Merging: before and after, every way, every size, each concept judged once."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.comparison import measuring
from sbora_diffusion.comparison.lines import key_of, read_lines
from sbora_diffusion.comparison.merge import groups_of, run_merge, sizes_of
from sbora_diffusion.comparison.single import run_single
from sbora_diffusion.core.errors import NonFiniteError
from tests.comparison.conftest import NAMES, coloured


def test_every_concept_is_judged_before_and_after_each_merge(quick, work):
    done = work(methods=["sbora-fa", "lora", "class-word"], seeds=[0])
    run_merge(done)
    lines = read_lines(Path("record"))
    ways = [("sbora-fa", "sum"), ("sbora-fa", "sum-0.6"), ("lora", "sum"), ("lora", "mean")]
    assert [(x["method"], x["merge"], x["concept"]) for x in lines] == [
        (*way, name) for way in ways for name in NAMES
    ]
    run_single(work(out="alone", methods=["sbora-fa", "lora"], seeds=[0]))
    alone = {(x["method"], x["concept"]): x["alone"] for x in read_lines(Path("alone"))}
    for line in lines:
        own = alone[line["method"], line["concept"]]
        assert line["before"] == {key: own[key] for key in ("raw-cosine", "mix-of-show")}
        two, three = line["after"]["2"], line["after"]["3"]
        assert line["concept"] in two["with"] and len(two["with"]) == 2
        assert three["with"] == list(NAMES) and three["seconds"] >= 0
        assert three["figures"] != line["before"] != two["figures"]


def test_an_interrupted_merge_goes_on_and_draws_nothing_twice(quick, work, monkeypatch):
    run_merge(work(out="whole", methods=["lora"], seeds=[0]))
    run_merge(work(methods=["lora"], seeds=[0]))
    file = Path("record/small.jsonl")
    kept = file.read_text().splitlines(keepends=True)[:3]  # the first way
    file.write_text("".join(kept))
    drawn = []

    def noted(base, prompts, *others):
        drawn.append((base.folded, len(prompts)))
        return coloured(base, prompts, *others)

    monkeypatch.setattr(measuring, "drawn", noted)
    run_merge(work(methods=["lora"], seeds=[0]))
    # Two of three in one model, the third with the first again, then all; none alone.
    assert drawn == [(True, 40), (True, 20), (True, 60)]

    def parts(folder):
        found = {}
        for line in read_lines(Path(folder)):
            after = {n: part["figures"] for n, part in line["after"].items()}
            found[key_of(line)] = line["before"], after
        return found

    assert parts("record") == parts("whole")


def test_a_merge_whose_pictures_became_nan_is_recorded_as_broken(quick, work, monkeypatch):
    def broken(base, prompts, *others):
        if len(prompts) > 20:  # more than one concept
            raise NonFiniteError("the picture became NaN")
        return coloured(base, prompts, *others)

    monkeypatch.setattr(measuring, "drawn", broken)
    run_merge(work(methods=["sbora-fa"], seeds=[0]))
    line = json.loads(Path("record/small.jsonl").read_text().splitlines()[0])
    assert line["after"]["3"] == {"with": list(NAMES), "broken": "the picture became NaN"}
    assert line["before"]


@pytest.mark.parametrize("size", [2, 3, 5, 14])
def test_groups_judge_each_concept_once_and_have_the_size(size):
    names = [str(k) for k in range(14)]
    groups = groups_of(names, size)
    assert [name for _, judged in groups for name in judged] == names
    for merged, judged in groups:
        assert len(set(merged)) == size and merged[: len(judged)] == judged


def test_all_concepts_are_merged_last_and_no_size_twice():
    assert sizes_of((3, 14), 14) == [3, 14]
    assert sizes_of((3,), 2) == [2]
    assert sizes_of((8, 3, 3), 14) == [3, 8, 14]
