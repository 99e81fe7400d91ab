"""The study of two GPUs: its runs end in time and say why, its model is read, its record grows."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))
figures = importlib.import_module("scaling_study.figures")
processes = importlib.import_module("scaling_study.processes")
language = importlib.import_module("scaling_study.language")
study = importlib.import_module("study_scaling")


def python(text: str):
    return processes.start("a run", [sys.executable, "-c", text])


def test_a_distance_is_relative_to_the_first():
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert figures.distance(one, one) == 0.0
    other = {"a": torch.tensor([3.0, 0.5]), "b": torch.tensor([[4.0]])}
    assert figures.distance(one, other) == pytest.approx(0.1)


def test_a_run_gives_its_document_whatever_libraries_say():
    written = processes.finished(python("print('a notice'); print({}); print('more')"), 60)
    assert processes.document(written) == {}


def test_a_run_that_takes_too_long_is_stopped():
    began = time.monotonic()
    run = python("import time; time.sleep(100)")
    with pytest.raises(processes.Failed, match="a run: not done in 1 s, stopped"):
        processes.finished(run, 1)
    assert run.process.returncode is not None and time.monotonic() - began < 30


def test_a_run_that_fails_says_why_in_one_line():
    text = "import sys; sys.exit('a note\\nerror: there is no such model\\nand more')"
    with pytest.raises(processes.Failed) as caught:
        processes.finished(python(text), 60)
    assert str(caught.value) == "a run: status 1: error: there is no such model"


def test_what_nobody_waited_for_is_stopped():
    run = python("import time; time.sleep(100)")
    processes.stop_all()
    assert run.process.returncode is not None


def test_the_random_model_is_a_whole_one_with_a_tokenizer(tmp_path):
    about = language.write_model(tmp_path / "model", "cpu", tiny=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == about["parameters"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("3 + 4", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()


def options(record: Path, *parts: str) -> argparse.Namespace:
    return argparse.Namespace(
        measure=None, device="cpu", record=record, parts=list(parts), commit="abc", tiny=True
    )


def test_each_part_is_in_the_record_when_it_is_done(tmp_path, monkeypatch):
    record = tmp_path / "scale.json"

    def breaks(_args, _folder):
        assert json.loads(record.read_text())["workers"]["efficiency"] == 1.0
        raise processes.Failed("no luck")

    made = {"workers": lambda _args, _folder: {"efficiency": 1.0}, "killed": breaks}
    monkeypatch.setattr(study, "PARTS", made)
    monkeypatch.setattr(study, "arguments", lambda: options(record, "workers", "killed"))
    with pytest.raises(SystemExit) as ended:
        study.main()
    assert ended.value.code == 1
    found = json.loads(record.read_text())
    assert found["killed"]["failed"] == "no luck" and found["killed"]["run"]["commit"] == "abc"
    made["killed"] = lambda _args, _folder: {"same_files": 4}
    monkeypatch.setattr(study, "arguments", lambda: options(record, "killed"))
    study.main()
    found = json.loads(record.read_text())
    assert found["killed"]["same_files"] == 4 and found["workers"]["efficiency"] == 1.0


def test_a_kind_that_cannot_work_leaves_the_other(tmp_path, monkeypatch):
    def trained(_args, kind, count, folder, _until):
        if kind == "bf16":
            raise processes.Failed("bf16: memory is full")
        place = folder / f"{kind}-{count}"
        place.mkdir()
        factor = torch.tensor([1.0, 0.1 * count])
        language.save_file({"a.sbora_factor": factor}, place / language.WEIGHTS)
        return {"step_seconds": 1.0 / count, "losses": [2.0, 1.0 + 0.01 * count]}

    monkeypatch.setattr(language, "trained", trained)
    found = language.language(options(tmp_path), tmp_path)
    assert found["bf16"] == {"failed": "bf16: memory is full"}
    assert found["nf4"]["speedup"] == 2.0
    assert found["nf4"]["loss_difference"] == {"value": 0.01, "limit": 0.05, "met": True}
    assert 0.05 < found["nf4"]["adapter_difference"]["value"] < 0.15
