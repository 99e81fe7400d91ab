"""`sbora merge` in its three forms, and where what it writes is taken again."""

import copy
import json

import pytest
import torch

from sbora_diffusion import cli_merge
from sbora_diffusion.core.concept import read_concept
from sbora_diffusion.core.concept_set import read_concept_set
from sbora_diffusion.diffusion import bases, calibrated, refinement
from sbora_diffusion.diffusion.merging import Merged
from sbora_diffusion.diffusion.moments import CalibrateConfig
from tests.diffusion.helpers import strong_concept
from tests.test_cli import refused

QUICK = ("-s", 'prompts=["a photo of {}"]', "-s", "generic=1", "-s", "steps=1")


@pytest.fixture(autouse=True)
def _one_base(pocket, monkeypatch, tmp_path):
    monkeypatch.setattr(bases, "load_base", lambda *_: copy.deepcopy(pocket))
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "library.sqlite3"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def files(pocket, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, slot in (("one", 0), ("two", 1), ("twin", 0)):
        strong_concept(pocket, folder, name, slot=slot)
    return folder


def model_bytes(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_set_is_one_file_whose_weights_multiply_wherever_a_concept_is_taken(
    sbora, files, tmp_path
):
    one, two = files / "one.safetensors", files / "two.safetensors"
    status, out, _ = sbora(
        "merge", f"{one}:0.5", two, "-o", "deep/pair.safetensors", "--as", "set", "--json"
    )
    facts = json.loads(out)
    assert status == 0 and (facts["as"], facts["allow_overlap"]) == ("set", False)
    assert facts["digest"] == read_concept_set("deep/pair.safetensors").digest
    assert sbora("merge", two, f"{one}:0.5", "-o", "other.safetensors", "--as", "set")[0] == 0
    pair = (tmp_path / "deep" / "pair.safetensors").read_bytes()
    assert pair == (tmp_path / "other.safetensors").read_bytes()

    halved = "deep/pair.safetensors:0.5"
    assert sbora("merge", halved, "-o", "from_set", "--no-calibrate")[0] == 0
    files = (f"{one}:0.25", f"{two}:0.5")
    assert sbora("merge", *files, "-o", "from_files", "--no-calibrate")[0] == 0
    assert model_bytes(tmp_path / "from_set") == model_bytes(tmp_path / "from_files")


def test_overlap_needs_permission_which_every_form_records_and_a_set_keeps(sbora, files, tmp_path):
    both = (files / "one.safetensors", files / "twin.safetensors")
    for form, output in (("model", "m"), ("set", "s.safetensors"), ("lora", "l")):
        words = ("'one'", "'twin'", "576 indices in 72 layers", "--allow-overlap")
        assert refused(sbora("merge", *both, "-o", output, "--as", form), *words)
        assert not (tmp_path / output).exists()
        options = ("--as", form, "--allow-overlap", "--no-calibrate")
        assert sbora("merge", *both, "-o", output, *options)[0] == 0
    assert read_concept_set("s.safetensors").allow_overlap is True
    for folder in ("m", "l"):
        record = json.loads((tmp_path / folder / "sbora.json").read_text())
        assert record["allow_overlap"] is True and record["overlaps"][0]["indices"] == 576
    assert sbora("merge", "s.safetensors", "-o", "again", "--no-calibrate")[0] == 0
    two = files / "two.safetensors"
    assert refused(sbora("merge", "s.safetensors", two, "-o", "more"), "share 576 indices")


def test_a_lora_says_how_diffusers_loads_it(sbora, files):
    status, out, _ = sbora("merge", files / "one.safetensors", "-o", "lora", "--as", "lora")
    assert status == 0
    assert "load_lora_weights('lora')" in out and "embeddings/one.safetensors" in out


def test_a_narrow_type_is_written_in_every_form(sbora, files, tmp_path):
    one = files / "one.safetensors"
    for form, output in (("model", "m"), ("set", "s.safetensors"), ("lora", "l")):
        status, out, _ = sbora(
            "merge", one, "-o", output, "--as", form, "--dtype", "bf16", "--json"
        )
        assert status == 0 and json.loads(out)["dtype"] == "bf16"
    assert (tmp_path / "s.safetensors").stat().st_size < 0.7 * one.stat().st_size


def test_a_damaged_set_and_an_output_that_is_no_set_are_refused(sbora, files, tmp_path):
    one = files / "one.safetensors"
    assert refused(sbora("merge", one, "-o", "pair", "--as", "set"), "must end in .safetensors")
    (tmp_path / "mine.safetensors").write_text("x")
    assert refused(
        sbora("merge", one, "-o", "mine.safetensors", "--as", "set"), "not a concept file"
    )
    assert sbora("merge", one, "-o", "s.safetensors", "--as", "set")[0] == 0
    data = bytearray((tmp_path / "s.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "s.safetensors").write_bytes(data)
    assert refused(sbora("merge", "s.safetensors", "-o", "m"), "s.safetensors", "damaged")


def test_a_member_of_a_set_is_found_by_its_name_in_the_library(sbora, files):
    both = (files / "one.safetensors", files / "two.safetensors")
    assert sbora("merge", *both, "-o", "pair.safetensors", "--as", "set")[0] == 0
    assert sbora("library", "add", "pair.safetensors")[0] == 0
    status, out, _ = sbora("merge", "two:0.5", "-o", "m", "--json")
    assert status == 0
    assert json.loads(out)["concepts"] == [{"name": "two", "weight": 0.5}]


def test_a_model_of_several_concepts_is_calibrated_unless_that_is_switched_off(
    sbora, pocket, files, tmp_path
):
    one, two = strong_pair = (files / "one.safetensors", files / "two.safetensors")
    status, out, _ = sbora("merge", *strong_pair, "-o", "fitted", *QUICK)
    assert status == 0 and "on 1 prompts of each concept and 1 without any" in out
    record = json.loads((tmp_path / "fitted" / "sbora.json").read_text())
    assert (record["calibration"]["steps"], record["calibration"]["generic_weight"]) == (1, 0.36)
    assert sbora("merge", two, one, "-o", "turned", *QUICK)[0] == 0
    assert model_bytes(tmp_path / "turned") == model_bytes(tmp_path / "fitted")

    status, out, _ = sbora("merge", one, two, "-o", "plain", "--no-calibrate", "--json")
    assert status == 0 and json.loads(out)["calibration"] is None
    merged = Merged(pocket, [(read_concept(file), 1.0) for file in strong_pair])
    merged.save(tmp_path / "sum")
    merged.restore()
    assert model_bytes(tmp_path / "plain") == model_bytes(tmp_path / "sum")
    differing = {
        str(name)
        for name, content in model_bytes(tmp_path / "plain").items()
        if content != model_bytes(tmp_path / "fitted")[name]
    }
    assert {name.split("/")[0] for name in differing} == {"unet", "text_encoder", "sbora.json"}


def test_one_concept_is_calibrated_only_if_asked_to(sbora, files, tmp_path):
    one = files / "one.safetensors"
    status, out, _ = sbora("merge", one, "-o", "plain", "--json")
    assert status == 0 and json.loads(out)["calibration"] is None
    assert "calibration" not in json.loads((tmp_path / "plain" / "sbora.json").read_text())
    status, out, _ = sbora("merge", one, "-o", "fitted", "--calibrate", "--json", *QUICK)
    assert status == 0 and json.loads(out)["calibration"]["generic"] == 1
    assert model_bytes(tmp_path / "fitted") != model_bytes(tmp_path / "plain")


def test_a_model_is_refined_if_asked_to_and_on_a_gpu_by_itself(sbora, files, tmp_path, monkeypatch):
    both = (files / "one.safetensors", files / "two.safetensors")
    small = (*QUICK, "-s", "refine_rows=1", "-s", "refine_timesteps=1")

    def steps(*options):
        status, out, _ = sbora("merge", *both, "-o", options[0], "--json", *small, *options[1:])
        return json.loads(out)["calibration"]["refine"] if status == 0 else None

    assert steps("plain") == 0 == steps("not", "--no-refine")
    assert steps("two", "-s", "refine=2") == 2 == steps("twice", "--refine", "-s", "refine=2")
    assert json.loads((tmp_path / "two" / "sbora.json").read_text())["calibration"]["refine"] == 2
    assert model_bytes(tmp_path / "two") == model_bytes(tmp_path / "twice")
    assert model_bytes(tmp_path / "two") != model_bytes(tmp_path / "plain")
    monkeypatch.setattr(refinement, "STEPS", 1)
    assert steps("asked", "--refine") == 1
    elsewhere = property(lambda base: torch.device("cuda"))
    with monkeypatch.context() as patch:
        patch.setattr(bases.Base, "device", elsewhere)
        chosen = cli_merge._refining(CalibrateConfig(), None, copy.copy(bases.load_base()))
    assert chosen == CalibrateConfig(refine=1)


def test_refinement_that_cannot_be_meant_is_refused(sbora, files, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("work began"))
    both = ("merge", files / "one.safetensors", files / "two.safetensors", "-o", "m")
    assert refused(sbora(*both, "--refine", "--no-calibrate"), "--refine", "--calibrate")
    assert refused(sbora(*both, "--refine", "-s", "refine=0"), "--refine", "exclude")
    assert refused(sbora(*both, "--no-refine", "-s", "refine=5"), "--no-refine", "exclude")
    assert refused(sbora(*both, "-s", "refine=-1"), "refine", "greater than or equal to 0")
    assert not (tmp_path / "m").exists()


def test_a_full_memory_says_what_takes_less_of_it(sbora, files, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(calibrated, "Calibrated", full)
    both = (files / "one.safetensors", files / "two.safetensors")
    command = ("merge", *both, "-o", "full", *QUICK)
    saving = ("-s", "refine_gradient_checkpointing=true")
    assert refused(sbora(*command), "memory is full; try another --device")
    words = ("try -s refine_mixed_precision=bf16, --no-refine, another --device",)
    assert refused(sbora(*command, "--refine", *saving), *words)
    assert not (tmp_path / "full").exists()


def test_settings_of_the_calibration_are_checked_before_any_work(
    sbora, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(bases, "load_base", lambda *_: pytest.fail("work began"))
    both = (files / "one.safetensors", files / "two.safetensors")
    settings = tmp_path / "wrong.toml"
    settings.write_text("ridges = 1\n")
    wrong = ("merge", *both, "-o", "m")
    assert refused(sbora(*wrong, "-s", "ridge=0"), "ridge", "greater than 0")
    assert refused(sbora(*wrong, "-s", "stepz=2"), "did you mean 'steps'")
    assert refused(sbora(*wrong, "-s", 'prompts=["a photo"]'), "prompts.0")
    assert refused(sbora(*wrong, "--config", settings), "wrong.toml", "'ridge'")
    assert refused(sbora(*wrong, "--no-calibrate", "-s", "steps=2"), "--calibrate")
    assert refused(sbora(*wrong, "--as", "lora", "--calibrate"), "--as lora")
    assert not (tmp_path / "m").exists()
