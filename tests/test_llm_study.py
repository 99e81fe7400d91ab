"""The study of language models: what is run, how a record goes on, and its tables."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
plan = importlib.import_module("llm_study.plan")
lines = importlib.import_module("llm_study.lines")
tables = importlib.import_module("llm_study.tables")
running = importlib.import_module("llm_study.running")
study = importlib.import_module("study_llm")


def fabricated(seed_shift: float = 0.0) -> list[dict]:
    """A whole record: each method right as often as its rank and seed say."""
    found = []
    for run in plan.runs():
        tests = plan.GROUPS[run.group]["test"]
        right = run.rank + 5 * run.seed
        figures = {name: {"right": right, "answered": 100, "total": 200} for name in tests}
        found.append({"kind": "accuracy", **asdict(run), "tasks": figures})
    for run in plan.adapters("commonsense", 0, plan.RATE):
        figures = {"trained_parameters": 1000, "steps": 20, "seconds": 2.0, "peak_bytes": 2**30}
        found.append({"kind": "speed", **asdict(run), **figures})
    return found


def test_every_method_runs_at_every_rank_and_seed_on_both_bases():
    todo = list(plan.runs())
    assert len(todo) == len({run.key for run in todo}) == 2 + 2 * 2 * 12
    assert [run.seed for run in todo[2:]] == sorted(run.seed for run in todo[2:])
    for run in todo[2:]:
        config = plan.config_of(run)
        nf4 = run.quantize == "nf4"
        assert (config.scaled_alpha / config.rank == 0.25) if nf4 else (config.dropout == 0.05)
        assert len(config.targets) == (7 if nf4 else 5)


def test_a_record_is_read_by_what_lines_are_about(tmp_path):
    run = plan.Run("arithmetic", "lora", 32)
    line = {"kind": "accuracy", **asdict(run), "tasks": {}}
    lines.append(tmp_path / "a.jsonl", line)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"kind":"accur')  # a process that was killed
    other = {**line, "seed": 1}
    lines.append(tmp_path / "a.jsonl", other)
    lines.append(tmp_path / "b.jsonl", line)
    assert list(lines.read_lines(tmp_path).values()) == [line, other]
    assert ("accuracy", *run.key) in lines.read_lines(tmp_path)


def test_tables_have_the_papers_figures_beside_ours():
    made = tables.tables(fabricated())
    commonsense = made["commonsense"]
    assert len(commonsense) == 2 + 1 + 12
    lora = next(row for row in commonsense if row.startswith("| LoRA | 32 |"))
    assert "17.2 (66.8)" in lora and "17.2 ± 1.8 (75.6)" in lora  # seven of the eight tasks
    assert any(row.startswith("| QSBoRA-FB | 64 | 33.2 |") for row in commonsense)
    arithmetic = made["arithmetic"]
    assert "MultiArith*" in arithmetic[0] and "average without *" in arithmetic[0]
    assert len(made["costs"]) == 2 + 12
    assert "| LoRA | 32 | bf16 | 1,000 | 100 | 1.00 | 1.00 |" in made["costs"]


def test_tables_of_an_unfinished_record_have_the_rows_that_there_are():
    some = [line for line in fabricated() if line["seed"] == 0 and line["method"] != "dora"]
    made = tables.tables(some)
    assert len(made["commonsense"]) == 2 + 1 + 9 and "±" not in "".join(made["commonsense"])
    assert tables.tables([])["arithmetic"][2:] == []


def test_the_page_has_a_place_for_every_table(tmp_path):
    record = tmp_path / "lines.jsonl"
    record.write_text("".join(json.dumps(line) + "\n" for line in fabricated()))
    page = tmp_path / "llm.md"
    page.write_text((ROOT / "docs" / "llm.md").read_text(encoding="utf-8"), encoding="utf-8")
    args = type("Args", (), {"files": tmp_path, "page": page, "rate": plan.RATE})
    study.report(args)
    assert "QSBoRA-FB" in page.read_text(encoding="utf-8")


def test_work_goes_on_where_it_was_and_ends_in_time(tmp_path, monkeypatch):
    args = type(
        "Args", (), {"files": tmp_path, "part": 1, "parts": 2, "limit": 1e9, "device": "cpu",
                     "commit": "abc"},
    )  # fmt: skip
    asked = []

    def act(run):
        asked.append(run)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"tasks": {}}

    with pytest.raises(KeyboardInterrupt):
        study.work(args, "accuracy", plan.runs(), act)
    study.work(args, "accuracy", plan.runs(), act)
    mine = list(plan.runs())[0::2]
    assert asked == [*mine[:3], *mine[2:]] and len(lines.read_lines(tmp_path)) == len(mine)
    args.limit, args.part = -1.0, 2
    study.work(args, "accuracy", plan.runs(), act)
    assert len(asked) == len(mine) + 1
