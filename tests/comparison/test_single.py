"""Concepts alone: what is recorded, and that interrupted or shared work gives the same."""

import json
from pathlib import Path

import pytest

from sbora_diffusion.comparison import measuring
from sbora_diffusion.comparison.lines import key_of, read_lines
from sbora_diffusion.comparison.preset import load_preset
from sbora_diffusion.comparison.single import run_single
from sbora_diffusion.comparison.work import Part, Progress
from sbora_diffusion.core.errors import ConfigError, ConflictError, FormatError, NonFiniteError
from sbora_diffusion.diffusion.baselines.interface import Method
from sbora_diffusion.evaluation.protocols import MIX_OF_SHOW
from tests.comparison.conftest import NAMES, coloured


def figures(folder="record"):
    return {key_of(line): line.get("alone") for line in read_lines(Path(folder))}


@pytest.fixture
def trainings(monkeypatch):
    """Names of the concepts of each training."""
    found, train = [], Method.train

    def counted(self, base, subjects, *args, **options):
        found.append([subject.settings.name for subject in subjects])
        return train(self, base, subjects, *args, **options)

    monkeypatch.setattr(Method, "train", counted)
    return found


def test_pictures_are_drawn_and_judged_by_every_protocol(work):
    run_single(work(methods=["class-word", "sbora-fa"], concepts=NAMES[:1], seeds=[1]))
    bare, ours = read_lines(Path("record"))
    assert (bare["method"], ours["method"]) == ("class-word", "sbora-fa")
    for line in (bare, ours):
        assert {"commit", "device", "versions", "date", "seconds", "command"} <= line["run"].keys()
        assert line["setting"]["config"]["seed"] == line["seed"] == 1
        raw, scaled = line["alone"]["raw-cosine"], line["alone"]["mix-of-show"]
        assert raw["pictures"] == 20 and -1 <= raw["text_alignment"] <= 1
        assert raw["image_alignment"].items() <= scaled["image_alignment"].items()
        assert len(scaled["image_alignment"]) == 2 == len(MIX_OF_SHOW.pairings)
        parts = [part["text_alignment"] for part in line["alone"]["groups"].values()]
        assert sum(parts) / 4 == pytest.approx(raw["text_alignment"], abs=1e-4)
    assert bare["alone"] != ours["alone"]
    assert (bare["trainable"]["weights"], ours["tuned"]) == (0, False)


def test_there_is_one_line_for_each_method_concept_and_seed(quick, work):
    done = work(methods=["lora-half", "class-word"])
    run_single(done)
    lines = read_lines(Path("record"))
    halves = {("lora-half", seed, name) for seed in (0, 1) for name in NAMES}
    bound = {("class-word", 0, name) for name in NAMES}  # no seed changes it
    assert {(x["method"], x["seed"], x["concept"]) for x in lines} == halves | bound
    assert len(lines) == 9 == done.progress.done == done.progress.total
    half = next(line for line in lines if line["method"] == "lora-half")
    assert half["setting"]["config"]["rank"] == 2 and half["title"] == "LoRA, half"


def test_an_interrupted_run_goes_on_where_it_was_and_gives_the_same(
    quick, work, trainings, monkeypatch
):
    run_single(work(out="whole", files=Path("other"), methods=["lora"], seeds=[0]))
    trainings.clear()
    found = measuring.Measures.figures

    def stopped(self, words, keep=None):
        if words.keys() == {NAMES[1]}:
            raise KeyboardInterrupt
        return found(self, words, keep)

    with monkeypatch.context() as patch:
        patch.setattr(measuring.Measures, "figures", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_single(work(methods=["lora"], seeds=[0]))
    (file,) = Path("record").glob("*.jsonl")
    with file.open("a") as opened:
        opened.write('{"preset": "small", "method": "lo')
    assert len(read_lines(Path("record"))) == 1
    again = work(methods=["lora"], seeds=[0])
    run_single(again)
    assert again.progress.done == again.progress.total == 2
    assert [json.loads(line)["concept"] for line in file.read_text().splitlines()] == list(NAMES)
    assert figures() == figures("whole")
    assert trainings == [list(NAMES)]  # what was trained before the interruption was kept
    run_single(over := work(methods=["lora"], seeds=[0]))
    assert over.progress.total == 0


def test_parts_write_files_of_their_own_that_join_to_the_whole(quick, work):
    run_single(work(out="whole", methods=["words", "class-word"]))
    parts = [work(methods=["words", "class-word"], part=k, parts=2) for k in (1, 2)]
    for part in parts:
        run_single(part)
    assert len({part.record.file for part in parts}) == 2
    assert all(read_lines(Path("record")) and part.progress.done for part in parts)
    assert figures() == figures("whole")
    assert sum(part.progress.done for part in parts) == len(figures("whole"))


def test_nothing_new_begins_after_the_limit(quick, work):
    late = work(methods=["class-word"], limit=0.0)
    run_single(late)
    assert (late.progress.done, late.progress.total) == (0, 3) and not read_lines(Path("record"))
    run_single(work(methods=["class-word"], limit=60.0))
    assert len(read_lines(Path("record"))) == 3


def test_a_record_of_another_setting_is_refused(quick, work, preset_file):
    run_single(work(methods=["class-word"]))
    other = load_preset(str(preset_file), overrides={"steps": 2})
    with pytest.raises(ConflictError, match=r"drawing\.steps was 1, is 2"):
        run_single(work(other, methods=["class-word"]))


def test_a_line_from_before_a_setting_existed_has_its_default(quick, work):
    run_single(work(methods=["class-word"], concepts=NAMES[:1]))
    (file,) = Path("record").glob("*.jsonl")
    line = json.loads(file.read_text())
    del line["setting"]["config"]["ema"]
    file.write_text(json.dumps(line) + "\n")
    run_single(work(methods=["class-word"], concepts=NAMES[:1]))
    assert read_lines(Path("record")) == [line]


def test_concepts_that_were_trained_otherwise_are_refused(quick, work, preset_file):
    run_single(work(methods=["lora-half"], concepts=NAMES[:1], seeds=[0]))
    other = load_preset(str(preset_file), overrides={"common": {"rate_tokens": 0.5}})
    again = {"methods": ["lora-half"], "concepts": NAMES[:1], "seeds": [0], "out": "elsewhere"}
    with pytest.raises(ConflictError, match=r"config\.rate_tokens was .*, is 0\.5"):
        run_single(work(other, **again))
    note = Path(f"files/small/lora-half-0/{NAMES[0]}.json")
    made = json.loads(note.read_text())
    note.write_text(json.dumps({**made, "base": "sd1-0"}))
    with pytest.raises(ConflictError, match="base was 'sd1-0', is 'pocket-"):
        run_single(work(**again))
    note.write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        run_single(work(**again))


def test_a_concept_from_before_a_setting_existed_has_its_default(quick, work):
    options = {"methods": ["lora-half"], "concepts": NAMES[:1], "seeds": [0]}
    run_single(work(**options))
    note = Path(f"files/small/lora-half-0/{NAMES[0]}.json")
    made = json.loads(note.read_text())
    del made["config"]["ema"]
    note.write_text(json.dumps(made))
    run_single(work(**options, out="elsewhere"))
    assert json.loads(note.read_text()) == made, "it was not trained again"


def test_a_concept_keeps_its_slot_when_others_are_left_out(quick, work):
    run_single(work(methods=["lora-half"], concepts=NAMES[2:], seeds=[0]))
    (line,) = read_lines(Path("record"))
    assert line["setting"]["slot"] == 2


def test_what_became_nan_is_recorded_as_broken_and_the_rest_goes_on(quick, work, monkeypatch):
    def broken(base, prompts, *others):
        if any("<plushbear>" in prompt for prompt in prompts):
            raise NonFiniteError("the picture became NaN")
        return coloured(base, prompts, *others)

    monkeypatch.setattr(measuring, "drawn", broken)
    run_single(work(methods=["lora-half"], seeds=[0]))
    lines = {line["concept"]: line for line in read_lines(Path("record"))}
    assert lines["plushbear"]["broken"] == "the picture became NaN"
    assert all("alone" in lines[name] for name in NAMES if name != "plushbear")


def test_pictures_are_kept_where_they_are_asked_for(quick, work):
    run_single(work(methods=["class-word"], concepts=NAMES[:1], pictures=Path("drawn")))
    assert len(list(Path("drawn/alone/class-word-0").glob(f"{NAMES[0]}/*.png"))) == 20


def test_pictures_follow_from_prompt_and_number_alone(thin):
    how = {"num": 1, "steps": 1, "guidance": 1.0, "negative_prompt": ""}
    prompts, seeds = ["a photo of a cap", "a photo of a dog", "a photo of a train"], [5, 6, 7]
    together = list(measuring.drawn(thin, prompts, seeds, how, 8))
    apart = list(measuring.drawn(thin, prompts, seeds, how, 2))
    for one, other in zip(together, apart, strict=True):
        assert max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_damaged_lines_and_wrong_parts_are_refused(work):
    Path("record").mkdir()
    Path("record/small.jsonl").write_text('{"preset": "small"}\n{"half')
    with pytest.raises(FormatError, match=r"line 1 of .*small\.jsonl"):
        work()
    with pytest.raises(ConfigError, match="--part must be 1 to 3, got 4"):
        Part(4, 3)


def test_progress_counts_lines():
    told = []
    progress = Progress(lambda *args: told.append(args))
    progress.begin(2)
    progress.step("one")
    assert told == [(0, 2, ""), (1, 2, "one")]
