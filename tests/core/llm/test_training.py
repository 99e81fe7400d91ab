"""Training an adapter: what changes, what is written, and going on after any end."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from peft import PeftModel
from safetensors.torch import load_file

from sbora_diffusion import cli
from sbora_diffusion.core.errors import ConfigError, NonFiniteError
from sbora_diffusion.core.llm import resuming
from sbora_diffusion.core.llm.adapters import check_fits, read_adapter
from sbora_diffusion.core.llm.config import LlmConfig, preset_names, read_preset
from sbora_diffusion.core.llm.loading import load_model
from sbora_diffusion.core.llm.prompts import Encoder, packed
from sbora_diffusion.core.llm.training import train
from sbora_diffusion.core.manifest import seal_folder
from sbora_diffusion.core.tuner import SboraLinear
from tests.core.llm.tiny import examples, save_base, tiny_llama, tokenizer

ROOT = Path(__file__).parents[3]
QUICK = {"rank": 4, "rate": 1e-2, "steps": 6, "batch_size": 4, "micro_batch_size": 2}
SETTINGS = [f"-s{key}={value}" for key, value in QUICK.items()] + ["-stemplate=plain"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.json"
    items = [{"instruction": e.instruction, "output": e.output} for e in examples(20)]
    path.write_text(json.dumps(items))
    return path


def rows(**options):
    return Encoder(tokenizer(), "plain", 64, **options).rows(examples())


def trained(tmp_path, model=None, content=None, **settings):
    config = LlmConfig(**{**QUICK, **settings})
    model = tiny_llama() if model is None else model
    return train(model, tokenizer(), content or rows(), config, tmp_path / "c", device="cpu")


@pytest.mark.parametrize("method", ["sbora-fa", "sbora-fb", "lora", "dora", "mora"])
def test_training_lowers_the_loss_and_leaves_the_base_alone(tmp_path, method):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    done = trained(tmp_path, model, method=method, steps=30, rate=3e-2)
    assert done.losses[-1][1] < done.losses[0][1] - 0.05
    kept = {
        n.replace(".base_layer", ""): p for n, p in done.model.get_base_model().named_parameters()
    }
    assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_the_folded_form_trains_what_two_paths_train(tmp_path, monkeypatch):
    one = trained(tmp_path).model.state_dict()
    monkeypatch.setattr(
        SboraLinear, "form", property(lambda _self: None, lambda _self, _form: None)
    )
    two = trained(tmp_path).model.state_dict()
    keys = [key for key in one if "sbora_factor" in key]
    assert len(keys) == 10
    for key in keys:
        assert one[key].abs().max() > 0
        torch.testing.assert_close(one[key], two[key], atol=1e-4, rtol=1e-3)


def test_accumulated_and_packed_and_checkpointed_trainings_run(tmp_path):
    done = trained(tmp_path, content=packed(rows(), 64), gradient_checkpointing=True, dropout=0.1)
    assert done.steps == 6 and len(done.losses) == 1
    whole = trained(tmp_path, steps=None, epochs=2.0)
    assert whole.steps == 6  # 12 rows in batches of 4, twice


def test_each_steps_loss_is_kept_where_it_is_asked_for(tmp_path):
    done = trained(tmp_path, log_every=1, steps=3)
    assert [step for step, _ in done.losses] == [1, 2, 3]
    assert 0.0 < done.step_seconds < done.seconds
    assert math.isnan(trained(tmp_path, steps=1).step_seconds)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite after step"):
        trained(tmp_path, model)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        trained(tmp_path, dtype="fp16")
    with pytest.raises(ConfigError, match="target 'to_q' is no linear layer"):
        trained(tmp_path, targets=("to_q",))
    with pytest.raises(ConfigError, match="does not go with packing"):
        trained(tmp_path, method="prompt-tuning", content=packed(rows(), 64))
    with pytest.raises(ValueError, match="multiple of micro_batch_size"):
        LlmConfig(batch_size=3, micro_batch_size=2)
    with pytest.raises(ValueError, match="double_quant needs"):
        LlmConfig(double_quant=True)


def test_presets_are_the_papers_settings():
    assert preset_names() == ["arithmetic", "commonsense", "mmlu"]
    for name in preset_names():
        LlmConfig(**read_preset(name)["training"])
    arithmetic = LlmConfig(**read_preset("arithmetic")["training"])
    assert (arithmetic.rate, arithmetic.epochs, arithmetic.batch_size) == (3e-4, 3.0, 8)
    assert arithmetic.scaled_alpha == 64.0
    mmlu = LlmConfig(**read_preset("mmlu")["training"])
    assert mmlu.scaled_alpha / mmlu.rank == 0.25 and len(mmlu.targets) == 7
    with pytest.raises(ConfigError, match="did you mean 'arithmetic'"):
        read_preset("arithmetics")


def factors(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def killed_before_sealing(arguments: list[str]) -> None:
    """Run a command that ends by SIGKILL when the checkpoint of step 4 is written, not sealed."""

    def seal(folder: Path, version: str) -> None:
        if folder.name == "checkpoint-4":
            os.kill(os.getpid(), signal.SIGKILL)
        seal_folder(folder, version)

    resuming.seal_folder = seal
    cli.main(arguments)


def weights_only_of_loads(monkeypatch) -> list[object]:
    """Grows with each `torch.load`, whoever calls it."""
    load, found = torch.load, []

    def noted(*args, **options):
        found.append(options.get("weights_only"))
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noted)
    return found


def test_a_killed_training_goes_on_bit_for_bit(tmp_path, base, data, sbora, monkeypatch):
    options = [base, data, *SETTINGS, "-sdropout=0.1", "--save-every", 2, "--device", "cpu"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert sbora("llm", "train", *options, "-o", whole)[0] == 0
    arguments = ["llm", "train", *map(str, options), "-o", str(resumed)]
    process = get_context("fork").Process(target=killed_before_sealing, args=(arguments,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "resumed.checkpoints" / "checkpoint-4").is_dir()  # not sealed
    status, _, error = sbora("llm", "train", *options, "-o", resumed)
    assert status == 2 and "holds an unfinished training" in error
    loads = weights_only_of_loads(monkeypatch)
    status, _, error = sbora("llm", "train", *options, "-o", resumed, "--resume")
    assert status == 0 and "going on from step 2" in error
    assert loads and set(loads) == {True}
    assert factors(resumed) == factors(whole)
    assert (resumed / "sbora.json").read_bytes() == (whole / "sbora.json").read_bytes()
    assert not (tmp_path / "resumed.checkpoints").exists()


def test_a_changed_checkpoint_or_training_is_not_gone_on_with(tmp_path, base, data, monkeypatch):
    from sbora_diffusion.core.errors import ConflictError, IntegrityError
    from sbora_diffusion.core.llm.jobs import train_adapter

    config = LlmConfig(**QUICK, template="plain")
    options = {"device": "cpu", "save_every": 2}
    monkeypatch.setattr("sbora_diffusion.core.llm.jobs.write_adapter", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_adapter(str(base), [data], config, tmp_path / "a", **options)
    folder = tmp_path / "a.checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    other = config.model_copy(update={"rate": 2e-2})
    with pytest.raises(ConflictError, match="other settings"):
        train_adapter(str(base), [data], other, tmp_path / "a", resume=True, **options)
    (folder / "checkpoint-6" / "optimizer.pt").write_bytes(b"x")
    said = []
    with pytest.raises(ZeroDivisionError):
        train_adapter(
            str(base), [data], config, tmp_path / "a", resume=True, tell=said.append, **options
        )
    assert "optimizer.pt is cut off" in said[0] and said[1] == "going on from step 4"
    for path in folder.iterdir():
        (path / "trainer_state.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"trainer_state\.json is cut off"):
        train_adapter(str(base), [data], config, tmp_path / "a", resume=True, **options)


def test_adapters_load_in_a_fresh_process_after_one_import(tmp_path, base, data, sbora):
    out = tmp_path / "adapter"
    assert sbora("llm", "train", base, data, *SETTINGS, "-o", out, "--device", "cpu")[0] == 0
    program = (
        "import {first}\nimport {second}\n"
        "import torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(base)!r}).eval()\n"
        f"model = PeftModel.from_pretrained(model, {str(out)!r}).eval()\n"
        "torch.save(model(torch.arange(1, 9)[None]).logits, {file!r})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    file = tmp_path / "logits.pt"
    text = program.format(first="sbora_diffusion", second="peft", file=str(file))
    subprocess.run([sys.executable, "-c", text], env=environment, check=True)
    model = PeftModel.from_pretrained(tiny_llama(), out).eval()
    with torch.no_grad():
        expected = model(torch.arange(1, 9)[None]).logits
    assert torch.equal(torch.load(file), expected)
    assert not torch.equal(tiny_llama()(torch.arange(1, 9)[None]).logits, expected)
    check_fits(read_adapter(out), tiny_llama())
    with pytest.raises(Exception, match="was trained on another model"):
        check_fits(read_adapter(out), tiny_llama(width=128))
    assert set(load_file(out / "adapter_model.safetensors")) and (out / "sbora.json").is_file()


def test_checkpoints_in_shards_are_refused():
    def refuse(kind: str) -> None:
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        state = SimpleNamespace(fsdp_plugin=plugin)
        resuming.refuse_shards(SimpleNamespace(accelerator=SimpleNamespace(state=state)))

    refuse("FULL_STATE_DICT")
    with pytest.raises(ConfigError, match=r"cannot be sealed; .*FULL_STATE_DICT"):
        refuse("SHARDED_STATE_DICT")


def test_a_base_of_pickles_is_refused(tmp_path, base):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigError, match=r"no language model: .*safetensors"):
        load_model(str(folder))


def test_wrong_input_is_one_line_and_writes_nothing(tmp_path, base, data, sbora):
    out, broken = tmp_path / "out", tmp_path / "broken.json"
    broken.write_text('[{"prompt": "a"}]')
    for arguments, told in (
        ((tmp_path, data), "holds no language model"),
        ((base, broken), "item 1 has the fields ['prompt']"),
        ((base, data, "-stargets=['to_q']"), "target 'to_q' is no linear layer"),
        ((base, data, "--method", "nonsense"), "unknown method 'nonsense'"),
        ((base, data, "--rank", "300"), "do not fit into"),
        ((base, data, "--preset", "math"), "no preset 'math'"),
        ((base, data, "-srat=1"), "did you mean 'rate'?"),
    ):
        status, _, error = sbora("llm", "train", *arguments, "-o", out, "--device", "cpu")
        assert status == 2 and told in error, error
        assert error.count("\n") == 1 and not out.exists()
    out.mkdir()
    (out / "file").touch()
    status, _, error = sbora("llm", "train", base, data, "-o", out)
    assert status == 2 and "is not empty" in error
