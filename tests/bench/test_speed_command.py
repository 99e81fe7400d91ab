"""`sbora bench speed`: its record, what is rendered from it, and what it refuses."""

import json

import pytest
from PIL import Image

from sbora_diffusion import records
from sbora_diffusion.bench import goals, methods
from sbora_diffusion.bench.methods import METHODS, Method
from sbora_diffusion.bench.plan import make_plan
from sbora_diffusion.bench.settings import SpeedConfig
from sbora_diffusion.bench.speed import rounds_of, run_speed
from sbora_diffusion.core.errors import ConfigError
from tests.test_cli import refused
from tests.test_results import wrong_goals

QUICK = SpeedConfig(
    rounds=2, warm_up=1, layer_rounds=2, merge_rounds=2, concepts=3, layer_width=32,
    layer_tokens=8, batches=[2], mixed_rows=3, training_steps=2,
)  # fmt: skip
OURS = ["sbora_fa_folded", "sbora_fb_folded", "lora"]
ARGUMENTS = (
    "bench", "speed", "--device", "cpu", "--shapes", "tiny", "--methods", ",".join(OURS),
    *(part for pair in QUICK.model_dump(exclude_defaults=True).items()
      for part in ("-s", f"{pair[0]}={pair[1]}")),
)  # fmt: skip


def measure(**changes):
    plan = make_plan(QUICK, "cpu", shapes=["tiny"], **changes)
    return run_speed(plan, "sbora bench speed", "abc")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def record():
    return measure(methods=OURS)


def test_a_record_says_where_it_comes_from_and_has_every_section(record):
    assert {"what", "commit", "command", "device", "versions", "date", "seconds"} <= record.keys()
    assert record["config"] == QUICK.model_dump(mode="json")
    assert record["finished"] and record["failed"] == {} and "training" not in record
    mixed = record["mixed_batch"]["tiny"]
    assert list(mixed["methods"]) == ["frozen", "mixed_fa", "mixed_fb"] and mixed["rows"] == 3
    assert mixed["failed"] == {} and mixed["folded_before"] == mixed["layers"] == 32
    step = record["step"]["tiny"]
    assert step["layers"] == 32 and step["failed"] == {} == step["batches"]["2"]["failed"]
    measured = step["batches"]["2"]["methods"]
    assert list(measured) == ["frozen", *OURS] and list(step["adapters"]) == list(measured)
    for modes in measured.values():
        figures = modes["eager"]
        low, high = figures["quartiles"]
        assert 0 < low <= figures["median"] <= high and figures["rounds"] == 2
    floor = measured["frozen"]["eager"]
    assert floor["over_floor"] == floor["peak_over_floor"] == 1.0 and floor["peak_bytes"] > 0
    assert measured["frozen"]["at_best"] == {"mode": "eager", "over_floor": 1.0}
    written = {"sbora_fa_folded_write_back", "sbora_fb_folded_write_back"}
    assert record["layer"]["methods"].keys() == {"frozen", *OURS} | written
    merging = record["merging"]["tiny"]
    assert merging["fa"].keys() == merging["fb"].keys() > {"merge_all", "switch_one_for_one"}
    assert all(figure["value"] > 0 for v in ("fa", "fb") for figure in merging[v].values())
    assert wrong_goals(record) == []


def test_memory_on_a_cpu_is_what_is_saved_and_the_folded_forms_save_least(record):
    measured = record["step"]["tiny"]["batches"]["2"]["methods"]
    peaks = {name: modes["eager"]["peak_bytes"] for name, modes in measured.items()}
    for folded in ("sbora_fa_folded", "sbora_fb_folded"):
        assert peaks["frozen"] < peaks[folded] < 1.02 * peaks["frozen"] < peaks["lora"]


def test_a_goal_stands_beside_its_figure_and_is_met_at_the_bound():
    def of(ratio, peak):
        return {
            "eager": {"over_floor": ratio, "peak_over_floor": peak},
            "at_best": {"mode": "eager", "over_floor": ratio},
        }

    methods_ = {
        "frozen": of(1, 1),
        "sbora_fa_folded": of(1.03, 1.01),
        "sbora_fb_folded": of(1.04, 1.05),
    }
    times = {"sbora_fa_folded eager": [1.0] * 3, "sbora_fb_folded eager": [1.0] * 3,
             "lora eager": [1.2] * 3, "dora eager": [1.5] * 3}  # fmt: skip
    found = goals.batch_goals("sd15", "cuda", 16, methods_, times)
    met = {name: goal["met"] for name, goal in found.items()}
    assert met == {
        "sbora_fa_folded: time over the floor": True,
        "sbora_fa_folded: speed in that of lora": True,
        "sbora_fa_folded: speed in that of dora": False,
        "sbora_fa_folded: memory over the floor": True,
        "sbora_fb_folded: time over the floor": False,
        "sbora_fb_folded: speed in that of lora": True,
        "sbora_fb_folded: speed in that of dora": False,
        "sbora_fb_folded: memory over the floor": False,
    }
    assert goals.batch_goals("sd15", "cuda", 4, methods_, times)[
        "sbora_fb_folded: time over the floor"
    ] == {"value": 1.04, "limit": 1.08, "met": True}
    assert len(goals.batch_goals("sd15", "cpu", 16, methods_, times)) == 2
    pocket = goals.batch_goals("pocket", "cpu", 4, methods_, times)
    assert all(goal["threshold"] == 1.15 and goal["met"] for goal in pocket.values())
    assert len(pocket) == 2 and goals.batch_goals("tiny", "cuda", 16, methods_, times) == {}


def test_sizes_are_held_against_loras_and_one_layer_against_the_frozen_one():
    adapters = {
        "lora": {"optimizer_bytes": 100, "file_bytes": 100},
        "sbora_fa_folded": {"optimizer_bytes": 51, "file_bytes": 52},
    }
    found = goals.size_goals("sd15", adapters)
    assert [goal["met"] for goal in found.values()] == [True, False]
    layer = {"sbora_fa_folded": {"over_floor": 1.1}, "sbora_fb_folded": {"over_floor": 1.26}}
    found = goals.layer_goals("cpu", "fp32", 320, layer)
    assert [goal["met"] for goal in found.values()] == [True, False]
    assert goals.layer_goals("cuda", "fp32", 320, layer) == {}
    assert goals.merge_limits("sd15", "cuda:0") == (5.0, 50.0)
    assert goals.merge_limits("tiny", "cpu") is None


def test_a_method_that_fails_is_recorded_with_its_reason_and_stops_no_other(monkeypatch):
    def late(site):
        adapter = METHODS["lora"].attach(site)
        site.model.register_forward_hook(lambda *_: _fail("no kernel"))
        return adapter

    def _fail(reason):
        raise RuntimeError(reason)

    monkeypatch.setitem(methods.METHODS, "oft", Method("early", lambda _: _fail("no room")))
    monkeypatch.setitem(methods.METHODS, "shira", Method("late", late))
    record = measure(only=["step"], methods=["oft", "shira"])
    step = record["step"]["tiny"]
    assert step["failed"] == {"oft eager": "RuntimeError: no room"}
    assert step["batches"]["2"]["failed"] == {"shira eager": "RuntimeError: no kernel"}
    assert list(step["batches"]["2"]["methods"]) == ["frozen"]


def test_a_method_without_its_package_is_left_out_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(
        methods.METHODS, "locon", Method("LoCon", lambda _: None, needs="no_such_package")
    )
    plan = make_plan(QUICK, "cpu")
    assert "locon" not in plan.methods and "no_such_package" in plan.absent["locon"]
    with pytest.raises(ConfigError, match="no_such_package"):
        make_plan(QUICK, "cpu", methods=["locon"])


def test_the_floor_is_always_there_and_names_may_be_joined_by_commas():
    plan = make_plan(QUICK, "cpu", methods=["lora, dora", "lora"], only=["step,layer"])
    assert plan.methods == ["frozen", "lora", "dora"] and plan.sections == ["step", "layer"]
    assert plan.shapes == ["pocket"]  # which suits a CPU
    assert "training" not in make_plan(QUICK, "cpu").sections
    assert make_plan(QUICK, "cpu", only=["training"]).sections == ["training"]


def test_progress_counts_every_round_to_the_end():
    plan = make_plan(QUICK, "cpu", ["step", "layer"], ["tiny"], ["lora"])
    seen = []
    run_speed(plan, "", "abc", lambda done, total, note: seen.append((done, total, note)))
    total = rounds_of(plan)
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert {t for _, t, _ in seen} == {total} and seen[0][2] == "tiny, batch 2"


def test_the_command_writes_a_record_and_renders_it_from_the_file_alone(sbora, tmp_path):
    status, out, err = sbora(*ARGUMENTS, "--only", "layer,step", "--out", "new/a.json",
                             "--commit", "abc", "--json")  # fmt: skip
    assert status == 0, err
    record = json.loads((tmp_path / "new" / "a.json").read_text())
    assert record["commit"] == "abc" and "merging" not in record
    assert json.loads(out) == {**record, "warnings": []}
    assert "SBoRA-FA, folded" in err

    page, picture = tmp_path / "new" / "a.md", tmp_path / "new" / "a.png"
    first = page.read_bytes(), picture.read_bytes()
    assert "| LoRA (PEFT) | eager |" in page.read_text() and Image.open(picture).width > 900
    assert sbora("bench", "speed", "--render", "new/a.json")[0] == 0
    assert (page.read_bytes(), picture.read_bytes()) == first


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--shapes", "sd51"), ("sd51", "'sd15'")),
        (("--methods", "lora,sbora_fa_fold"), ("sbora_fa_fold", "'sbora_fa_folded'")),
        (("--only", "steps"), ("'step'",)),
        (("-s", "round=3"), ("'round'", "'rounds'")),
        (("-s", "rounds=1"), ("rounds",)),
        (("--device", "nonsense"), ("nonsense", "--device cpu")),
        (("--graphs", "--device", "cpu"), ("CUDA", "--graphs")),
        (("--out", "a.txt"), ("a.txt", ".json")),
        (("--render", "missing.json"), ("missing.json",)),
        (("--render", "x.json", "--compile"), ("--compile",)),
        (("--render", "x.json", "--limit", "5"), ("--limit",)),
        (("--limit", "0"), ("limit",)),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_any_work(sbora, tmp_path, arguments, words):
    assert refused(sbora("bench", "speed", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_record_is_neither_overwritten_nor_rendered(sbora, tmp_path):
    file = tmp_path / "mine.json"
    for content in ('{"what": "something else"}', "[1]", "no json"):
        file.write_text(content)
        assert refused(sbora(*ARGUMENTS, "--out", file), "mine.json", "another --out")
        assert refused(sbora("bench", "speed", "--render", file), "mine.json")
        assert file.read_text() == content and list(tmp_path.iterdir()) == [file]


def test_without_a_checkout_the_commit_must_be_given(monkeypatch):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(records.subprocess, "check_output", no_git)
    with pytest.raises(ConfigError, match="--commit"):
        records.run_of("x", "cpu", 1.0, None)
    assert records.run_of("x", "cpu", 1.0, "abc")["commit"] == "abc"
