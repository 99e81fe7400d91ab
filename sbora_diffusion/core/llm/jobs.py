"""From files to an adapter: what `sbora llm train` does."""

import hashlib
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sbora_diffusion.core.errors import ConflictError
from sbora_diffusion.core.llm.config import LlmConfig
from sbora_diffusion.core.llm.data import read_all
from sbora_diffusion.core.llm.loading import load_model, load_tokenizer
from sbora_diffusion.core.llm.prompts import Encoder, packed
from sbora_diffusion.core.llm.training import Done, is_main_process, train, write_adapter
from sbora_diffusion.core.llm.watching import Report

LIBRARIES = ("torch", "transformers", "peft")


def train_adapter(
    base: str,
    data: Sequence[Path],
    config: LlmConfig,
    output: Path,
    *,
    device: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    report: Report = lambda _step, _steps, _loss: None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Done:
    """Train an adapter on local data and write its folder.

    Checkpoints lie in `<output>.checkpoints` until it is written.

    Raises:
        SboraError: the base, the data, the settings or the output cannot be used.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConflictError(f"{output} exists and is not empty", "give another --output")
    examples = read_all(data)
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer, config.template, config.max_length, config.completion_only)
    rows = encoder.rows(examples)
    if len(rows) < len(examples):
        tell(f"{len(examples) - len(rows)} of {len(examples)} answers begin after max_length")
    rows = packed(rows, config.max_length) if config.packing else rows
    model = load_model(base, config.dtype, config.quantize, config.double_quant, device)
    place = output.with_name(f"{output.name}.checkpoints")
    done = train(
        model,
        tokenizer,
        rows,
        config,
        place,
        device=device,
        save_every=save_every,
        resume=resume,
        report=report,
        tell=tell,
    )
    if is_main_process():
        record = _record(base, data, config, done, len(examples), len(rows))
        write_adapter(output, done.model, record, done.gathered)
        done.checkpoints.remove()
    return done


def _record(
    base: str, data: Sequence[Path], config: LlmConfig, done: Done, examples: int, rows: int
) -> dict[str, Any]:
    """Without time, host or path, so that the same training writes the same bytes."""
    return {
        "base": base,
        "training": config.model_dump(mode="json"),
        "data": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data},
        "examples": examples,
        "rows": rows,
        "steps": done.steps,
        "trained_parameters": done.trained,
        "losses": done.losses,
        "versions": {name: version(name) for name in LIBRARIES},
    }
