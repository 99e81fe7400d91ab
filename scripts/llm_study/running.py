"""One run: train, merge, test."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_study.plan import DATA_SEED, GENERATED, GROUPS, Run, config_of
from sbora_diffusion.core.llm.adapters import read_adapter
from sbora_diffusion.core.llm.config import LlmConfig
from sbora_diffusion.core.llm.data import Example, read_all
from sbora_diffusion.core.llm.evaluation import Writing, evaluate
from sbora_diffusion.core.llm.loading import load_model, load_tokenizer
from sbora_diffusion.core.llm.merging import merged_model
from sbora_diffusion.core.llm.prompts import Encoder
from sbora_diffusion.core.llm.tasks import TASKS, overlap, read_test
from sbora_diffusion.core.llm.training import Done, train, write_adapter
from sbora_diffusion.core.llm.word_problems import word_problems

TEMPLATE = "alpaca"


class Bench:
    """A base model and the data, read once.

    Args:
        base, data: folders.
        limit: questions of each task and training examples; for a rehearsal.
        changes: of every training's settings; for a rehearsal.
    """

    def __init__(
        self, base: str, data: Path, device: str, limit: int | None, changes: dict[str, Any]
    ) -> None:
        self.base, self.data, self.device = base, data, device
        self.limit, self.changes = limit, changes
        self.tokenizer = load_tokenizer(base)
        self._examples: dict[str, list[Example]] = {}

    def examples(self, group: str) -> list[Example]:
        """The training set of a group."""
        if group not in self._examples:
            files = [_train_file(self.data / name) for name in GROUPS[group]["train"]]
            found = read_all(files)
            if group == "arithmetic":
                found += word_problems(DATA_SEED, GENERATED, self._questions())
            self._examples[group] = found[: self.limit]
        return self._examples[group]

    def run(self, run: Run) -> dict[str, Any]:
        """A run's figures."""
        if run.method == "base":
            model = load_model(self.base, "bf16", device=self.device)
            return {"tasks": self._tested(model, run.group)}
        config = config_of(run, **self.changes)
        with tempfile.TemporaryDirectory() as folder:
            done = self._trained(run, config, Path(folder))
            figures = _figures(done)
            model = self._merged(done, config, Path(folder) / "adapter")
            del done
            figures["tasks"] = self._tested(model, run.group)
        return {**figures, "settings": config.model_dump(mode="json")}

    def time(self, run: Run, steps: int) -> dict[str, Any]:
        """Step time and memory alone on the device, after as many steps to warm up."""
        config = config_of(run, **{**self.changes, "steps": steps, "epochs": 1.0})
        with tempfile.TemporaryDirectory() as folder:
            self._trained(run, config, Path(folder) / "warm")
            done = self._trained(run, config, Path(folder))
        return _figures(done)

    def _trained(self, run: Run, config: LlmConfig, folder: Path) -> Done:
        encoder = Encoder(self.tokenizer, config.template, config.max_length)
        rows = encoder.rows(self.examples(run.group))
        options = (config.dtype, config.quantize, config.double_quant, self.device)
        model = load_model(self.base, *options)
        return train(model, self.tokenizer, rows, config, folder, device=self.device)

    def _merged(self, done: Done, config: LlmConfig, folder: Path) -> Any:
        """What one would put to use: the adapter folded into 16 bits."""
        record = {"base": self.base, "training": config.model_dump(mode="json")}
        write_adapter(folder, done.model, record)
        return merged_model(self.base, [read_adapter(folder)], "bf16").to(self.device)

    def _tested(self, model: Any, group: str) -> dict[str, Any]:
        found, encoder = {}, Encoder(self.tokenizer, TEMPLATE, 1 << 30)
        large = self.device.startswith("cuda")
        writing = Writing(1, GROUPS[group]["new_tokens"], 1024 if large else 16)
        for name in GROUPS[group]["test"]:
            test = read_test(TASKS[name], self.data)[: self.limit]
            score = evaluate(model, encoder, TASKS[name], test, writing)
            found[name] = {
                "right": score.right,
                "answered": score.answered,
                "total": score.total,
                "trained": overlap(test, self.examples(group)),
            }
        return found

    def _questions(self) -> list[str]:
        names: Sequence[str] = GROUPS["arithmetic"]["test"]
        tests = [example for name in names for example in read_test(TASKS[name], self.data)]
        return [example.instruction for example in tests]


def _train_file(folder: Path) -> Path:
    lines = folder / "train.jsonl"
    return lines if lines.is_file() else folder / "train.json"


def _figures(done: Done) -> dict[str, Any]:
    return {
        "trained_parameters": done.trained,
        "steps": done.steps,
        "seconds": round(done.seconds, 3),
        "peak_bytes": done.peak_bytes,
        "losses": [[step, round(loss, 4)] for step, loss in done.losses],
    }


def make_base(gguf: Path, folder: Path) -> None:
    """A plain fp16 Llama from a GGUF file, whose quantized values it holds; needs `gguf`.

    transformers does not save a model that it read from GGUF.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(folder)
