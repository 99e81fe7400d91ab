"""Training an adapter with transformers' Trainer: resumable, on one device or many."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, prepare_model_for_kbit_training
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.core.folders import write_folder
from sbora_diffusion.core.llm.config import LlmConfig
from sbora_diffusion.core.llm.methods import Adapter, adapted, trained_parameters
from sbora_diffusion.core.llm.prompts import Collator, Row, padding_id
from sbora_diffusion.core.llm.resuming import Checkpoints, SealingCallback, refuse_shards
from sbora_diffusion.core.llm.shapes import check_targets, default_targets
from sbora_diffusion.core.llm.watching import Report, Watch, peak_memory, start_memory
from sbora_diffusion.core.tuner.folded_training import FoldedTraining, folded_training

RECORD = "sbora.json"
"""Beside an adapter: its base, settings, data and losses."""
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "paged-adamw-8bit": "paged_adamw_8bit",
    "paged-adamw-32bit": "paged_adamw_32bit",
}


@dataclass
class Done:
    """What a training gave.

    Attributes:
        losses: (step, mean loss since the one before), every `log_every` steps and at checkpoints.
        seconds: from the first step to the last one.
        step_seconds: of one step, the median; NaN if there was but one.
        peak_bytes: most memory that tensors took on any of the GPUs; 0 on a CPU.
        gathered: the adapter's tensors, where FSDP has divided the model's.
    """

    model: PeftModel
    checkpoints: Checkpoints
    trained: int
    steps: int
    seconds: float
    step_seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)
    peak_bytes: int = 0
    gathered: dict[str, torch.Tensor] | None = None


def adapter_of(config: LlmConfig, model: nn.Module, steps: int = 0) -> Adapter:
    """What a training's settings put into a model.

    Raises:
        ConfigError: a target is no linear layer of the model.
    """
    targets = config.targets
    targets = check_targets(model, targets) if targets else default_targets(model)
    options = config.method_options
    if config.method == "adalora":
        options = {"total_step": steps, **options}
    return Adapter(
        config.method,
        config.rank,
        config.scaled_alpha,
        config.dropout,
        targets,
        config.slot,
        config.allocation_seed,
        options,
    )


def train(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    config: LlmConfig,
    folder: Path,
    *,
    device: str | None = None,
    save_every: int = 0,
    resume: bool = False,
    report: Report = lambda _step, _steps, _loss: None,
    tell: Callable[[str], None] = lambda _text: None,
) -> Done:
    """Train a new adapter in a loaded base model.

    Args:
        rows: of `prompts.Encoder.rows`, packed or not.
        folder: of the checkpoints; removed by the caller when the adapter is written.
        device: "cpu" keeps a CUDA machine from using its GPU.
        save_every: steps between two checkpoints, 0 for none.
        resume: go on from the newest whole checkpoint in the folder.

    Raises:
        ConfigError: the settings do not fit the model or the machine.
        IntegrityError: no checkpoint is whole.
        ConflictError: the checkpoints belong to another training.
        NonFiniteError: the loss is not finite.
    """
    arguments = _arguments(config, folder, device, save_every)
    steps = _steps(config, rows, arguments)
    torch.manual_seed(config.seed)
    adapter = adapter_of(config, model, steps)
    wrapped = adapted(_prepared(model, config, arguments), adapter)
    if "position_ids" in rows[0] and wrapped.active_peft_config.is_prompt_learning:
        raise ConfigError(f"{config.method!r} does not go with packing", "set packing = false")
    checkpoints = Checkpoints(folder, identity(config, rows, model), tell)
    if not resume:
        checkpoints.begin_anew()
    start = checkpoints.newest() if resume else None
    watch = Watch(steps, report)
    trainer = Trainer(
        model=wrapped,
        args=arguments,
        train_dataset=list(rows),  # type: ignore[arg-type]
        data_collator=Collator(padding_id(tokenizer)),
        callbacks=[watch, SealingCallback(checkpoints)],
    )
    refuse_shards(trainer)
    trainer.remove_callback(PrinterCallback)
    start_memory()
    with _folded(wrapped, trainer):
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    return Done(
        wrapped,
        checkpoints,
        trained_parameters(wrapped),
        steps,
        watch.seconds,
        watch.step_seconds,
        watch.losses,
        peak_memory(),
        _gathered(wrapped, trainer),
    )


def is_main_process() -> bool:
    """Whether this is the process that writes, of all that `accelerate launch` started."""
    return PartialState().is_main_process


def write_adapter(
    folder: Path,
    model: PeftModel,
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write an adapter and its record, all of it or nothing.

    Args:
        tensors: in place of the model's.

    Raises:
        ConflictError: the folder exists and is not empty.
        ResourceError: it cannot be written.
    """

    def fill(place: Path) -> None:
        model.save_pretrained(str(place), state_dict=tensors)
        (place / "README.md").unlink(missing_ok=True)  # PEFT's is a form to be filled in
        text = json.dumps(record, indent=2, ensure_ascii=False)
        (place / RECORD).write_text(text + "\n", encoding="utf-8")

    write_folder(folder, fill)


def identity(config: LlmConfig, rows: Sequence[Row], model: nn.Module) -> dict[str, Any]:
    """What two trainings must share for one to go on from the other's checkpoint."""
    digest = hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()
    shapes = sorted((name, list(p.shape)) for name, p in model.named_parameters())
    base = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()
    return {"settings": config.model_dump(mode="json"), "data": digest, "base": base}


class _WriteBack(TrainerCallback):
    """Rewrites the trained columns or rows of all layers at once after each step."""

    def __init__(self, forms: FoldedTraining) -> None:
        self._forms = forms

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forms.write_back()


@contextmanager
def _folded(model: PeftModel, trainer: Trainer) -> Iterator[None]:
    """SBoRA in the base's weights while it trains, where that is possible: FSDP divides them."""
    if trainer.is_fsdp_enabled:
        yield
        return
    layers = {name: module for name, module in model.named_modules()}
    with folded_training(layers, "default") as forms:
        trainer.add_callback(_WriteBack(forms))
        yield


def _prepared(model: nn.Module, config: LlmConfig, arguments: TrainingArguments) -> nn.Module:
    model.requires_grad_(False)
    if config.quantize == "none":
        if config.gradient_checkpointing:
            model.enable_input_require_grads()  # type: ignore[operator]
        return model
    return prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs=arguments.gradient_checkpointing_kwargs,
    )


def _arguments(
    config: LlmConfig, folder: Path, device: str | None, save_every: int
) -> TrainingArguments:
    cpu = device == "cpu" or not torch.cuda.is_available()
    if cpu and config.dtype == "fp16":
        raise ConfigError("training in fp16 needs a GPU", "set dtype = 'bf16' or 'fp32'")
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.micro_batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.rate,
        lr_scheduler_type=_schedule(config),
        warmup_steps=config.warmup,
        max_grad_norm=config.clip,
        weight_decay=config.weight_decay,
        optim=_OPTIMIZERS[config.optimizer],
        fp16=config.dtype == "fp16",
        bf16=config.dtype == "bf16",
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=2,
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        use_cpu=cpu,
    )
    if arguments.n_gpu > 1:  # without a launcher Trainer would copy the model to all GPUs
        arguments._n_gpu = 1
    arguments.gradient_accumulation_steps = _accumulation(config, arguments.world_size)
    return arguments


def _schedule(config: LlmConfig) -> str:
    constant = config.schedule == "constant" and config.warmup
    return "constant_with_warmup" if constant else config.schedule


def _accumulation(config: LlmConfig, devices: int) -> int:
    at_once = config.micro_batch_size * devices
    if config.batch_size % at_once:
        raise ConfigError(
            f"batch_size {config.batch_size} is no multiple of {config.micro_batch_size} examples "
            f"on {devices} devices",
            f"set batch_size to a multiple of {at_once}",
        )
    return config.batch_size // at_once


def _steps(config: LlmConfig, rows: Sequence[Row], arguments: TrainingArguments) -> int:
    """As Trainer counts them: a last, smaller batch of each epoch is a step too."""
    if config.steps:
        return config.steps
    batches = -(-len(rows) // (config.micro_batch_size * arguments.world_size))
    an_epoch = max(-(-batches // arguments.gradient_accumulation_steps), 1)
    return math.ceil(config.epochs * an_epoch)


def _gathered(model: PeftModel, trainer: Trainer) -> dict[str, Any] | None:
    """Trained tensors and buffers in whole, where FSDP divides them; all processes call it."""
    if not trainer.is_fsdp_enabled:
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)
