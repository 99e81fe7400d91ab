"""An adapter for a model of Llama-3-8B's shape: on one GPU, and divided over two by FSDP2.

The weights are random, so a loss says nothing about language; that one GPU and two have the same
one does say that they compute the same.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ByT5Tokenizer, LlamaConfig

from sbora_diffusion.core.llm.adapters import WEIGHTS
from sbora_diffusion.core.llm.shapes import MODELS, meta_model
from sbora_diffusion.core.llm.word_problems import word_problems
from sbora_diffusion.records import at_most
from scaling_study.figures import distance
from scaling_study.processes import (
    DIVIDED,
    GPUS,
    Failed,
    document,
    finished,
    launcher,
    start,
)

SHAPE = "llama3-8b"
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
KINDS = {"bf16": "none", "nf4": "nf4"}
"""What the base is held in → `--quantize`; all products are in bf16."""
ROWS, TOKENS = 16, 256
"""Of a batch, however many GPUs share it; of a row at most, a byte each."""
LIMIT, RUN = 300.0, 100.0
"""Seconds for all of it, and for one training at most."""
LOSS_APART, APART = 0.05, 0.5
"""How far one GPU's losses and adapter (in its norm) may be from those of two. bf16 has eight bits:
a gradient is known to some percent, and where it is smaller than that Adam's first steps have
either sign. Adapters that have nothing to do with each other are 1.4 apart."""
ON_CPU = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""What accelerate's launcher sets from the file, for a rehearsal without it."""


def language(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both kinds, each on one GPU and on two; one that cannot work leaves the other."""
    until = time.monotonic() + LIMIT
    about = write_model(folder / "model", args.device, args.tiny)
    write_data(folder / "train.json", ROWS * steps(args))
    found: dict[str, Any] = {"model": about, "steps": steps(args), "rows_of_a_step": ROWS}
    for kind in KINDS:
        try:
            one, two = (trained(args, kind, count, folder, until) for count in (1, GPUS))
            found[kind] = compared(one, two, *(folder / f"{kind}-{n}" for n in (1, GPUS)))
        except Failed as error:
            found[kind] = {"failed": str(error)}
    return found


def steps(args: argparse.Namespace) -> int:
    return 3 if args.tiny else 10


def trained(
    args: argparse.Namespace, kind: str, count: int, folder: Path, until: float
) -> dict[str, Any]:
    """One training by `sbora llm train`, of a folder "<kind>-<count>"."""
    left = min(RUN, until - time.monotonic())
    if left < 1:
        raise Failed(f"{kind}, {count} GPUs: no time was left")
    on_cpu = args.device == "cpu"
    module = "tests.core.llm.divided" if on_cpu and count > 1 else "sbora_diffusion"
    command = [
        *launcher(count, args.device, DIVIDED), "-m", module, "llm", "train",
        str(folder / "model"), str(folder / "train.json"), "-o", str(folder / f"{kind}-{count}"),
        "--quantize", KINDS[kind], "--steps", str(steps(args)), "--save-every", "0", "--json",
        *(["--device", "cpu"] if on_cpu else []),
        *(f"-s{setting}" for setting in settings(count)),
    ]  # fmt: skip
    began = time.monotonic()
    variables = ON_CPU if on_cpu and count > 1 else {}
    what = f"{kind}, {count} GPUs" if count > 1 else f"{kind}, 1 GPU"
    told = document(finished(start(what, command, **variables), left))
    return {
        "step_seconds": told["step_seconds"],
        "peak_gib_of_any_gpu": round(told["peak_bytes"] / (1 << 30), 3) or None,
        "losses": [round(loss, 4) for _, loss in told["losses"]],
        "wall_seconds": round(time.monotonic() - began, 1),
    }


def settings(count: int) -> list[str]:
    own = f"micro_batch_size={ROWS // count}"
    return [
        "dtype=bf16", f"batch_size={ROWS}", own, f"max_length={TOKENS}", "template=plain",
        "rate=1e-3", "schedule=constant", "log_every=1",
    ]  # fmt: skip


def compared(one: dict[str, Any], two: dict[str, Any], *adapters: Path) -> dict[str, Any]:
    """Both trainings, and how far they are apart."""
    tensors = [load_file(folder / WEIGHTS) for folder in adapters]
    pairs = zip(one["losses"], two["losses"], strict=True)
    return {
        "one_gpu": one,
        "two_gpus": two,
        "speedup": round(one["step_seconds"] / two["step_seconds"], 3),
        "loss_difference": at_most(max(abs(a - b) for a, b in pairs), LOSS_APART),
        "adapter_difference": at_most(distance(*map(factors, tensors)), APART),
    }


def factors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name.endswith("sbora_factor")}


def write_data(file: Path, count: int) -> None:
    problems = [asdict(example) for example in word_problems(0, count)]
    file.write_text(json.dumps(problems), encoding="utf-8")


def write_model(folder: Path, device: str, tiny: bool) -> dict[str, Any]:
    """A model's folder in bf16 with a file for each layer, and a tokenizer of bytes."""
    began = time.monotonic()
    config = LlamaConfig(**(MODELS[SHAPE] | (TINY if tiny else {})), dtype="bfloat16")
    config.save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in meta_model(config).named_parameters():
        layer = name.split(".")[2] if ".layers." in name else "others"
        shards.setdefault(f"model-{layer}.safetensors", {})[name] = parameter.shape
    numbered = [(folder, number, *shard) for number, shard in enumerate(shards.items())]
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(lambda shard: _write_shard(*shard, device), numbered))
    if device != "cpu":
        torch.cuda.empty_cache()  # the trainings are other processes
    where = {name: file for file, shapes in shards.items() for name in shapes}
    index = {"metadata": {"total_size": 2 * sum(sizes)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {
        "shape": SHAPE if not tiny else "tiny",
        "parameters": sum(sizes),
        "seconds_to_write": round(time.monotonic() - began, 1),
    }


def _write_shard(
    folder: Path, seed: int, file: str, shapes: dict[str, torch.Size], device: str
) -> int:
    """How many numbers it has."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {name: _drawn(shape, generator).cpu() for name, shape in shapes.items()}
    save_file(tensors, folder / file, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """As Llama is initialized: norms of one, all else small."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": generator.device}
    if len(shape) == 1:
        return torch.ones(shape, **options)
    return torch.empty(shape, **options).normal_(0.0, 0.02, generator=generator)
