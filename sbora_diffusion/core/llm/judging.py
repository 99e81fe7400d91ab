"""A model, with or without an adapter, held against several tasks: what `sbora llm eval` does."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from sbora_diffusion.core.errors import BaseMismatch
from sbora_diffusion.core.llm.adapters import check_fits, read_adapter
from sbora_diffusion.core.llm.config import Template
from sbora_diffusion.core.llm.data import read_all
from sbora_diffusion.core.llm.evaluation import NEW_TOKENS, Score, Writing, evaluate
from sbora_diffusion.core.llm.harness import evaluate_tasks
from sbora_diffusion.core.llm.loading import load_model, load_tokenizer, own_device
from sbora_diffusion.core.llm.merging import load_merged
from sbora_diffusion.core.llm.prompts import Encoder
from sbora_diffusion.core.llm.tasks import Task, find_task, overlap, read_test


@dataclass(frozen=True)
class Opened:
    """A loaded model.

    Attributes:
        template: that its adapter was trained with.
    """

    model: Any
    tokenizer: Any
    template: Template = "alpaca"


@dataclass(frozen=True)
class Judging:
    """How questions are asked.

    Attributes:
        new_tokens: longest answer; by default that of the task's group.
        limit: questions of each task.
    """

    template: Template
    beams: int = 1
    new_tokens: int | None = None
    batch_size: int = 32
    limit: int | None = None

    def writing(self, task: Task) -> Writing:
        """For one task."""
        longest = self.new_tokens or NEW_TOKENS[task.group]
        return Writing(self.beams, longest, self.batch_size)


@dataclass(frozen=True)
class Judged:
    """A score, and how far it can be trusted.

    Attributes:
        trained: test questions that are in the training data at hand.
    """

    task: Task
    score: Score
    trained: int

    @property
    def remark(self) -> str:
        """What stands beside the figure."""
        if self.trained:
            return f"contaminated: {self.trained} of its questions were trained on"
        return f"often contaminated: {self.task.contaminated}" if self.task.contaminated else ""


def open_model(
    reference: str, adapter: Path | None = None, dtype: str = "fp32", device: str | None = None
) -> Opened:
    """Load a model, and put an adapter into it; one of an NF4 base gets that base.

    Raises:
        SboraError: the model or the adapter cannot be read, or they do not fit.
    """
    tokenizer, device = load_tokenizer(reference), device or own_device()
    if adapter is None:
        return Opened(load_merged(reference, dtype, device), tokenizer)
    task = read_adapter(adapter)
    training = task.training
    quantize, double = training.get("quantize", "none"), training.get("double_quant", False)
    model = load_model(reference, dtype, quantize, double, device)
    if task.is_sbora:
        check_fits(task, model)
    try:
        wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise BaseMismatch(
            f"{adapter} does not fit {reference}: {reason}", "give the base it was trained on"
        ) from error
    return Opened(wrapped.eval(), tokenizer, training.get("template", "alpaca"))


def judge(
    opened: Opened,
    data: Path,
    names: Sequence[str],
    how: Judging,
    trained_on: Sequence[Path] = (),
    report: Callable[[int, int, str], None] = lambda _done, _total, _task: None,
) -> list[Judged]:
    """Ask all questions of several tasks.

    Raises:
        ConfigError: a task is unknown.
        DataError: a test set cannot be read.
    """
    tasks = [find_task(name) for name in names]
    tests = {task.name: read_test(task, data)[: how.limit] for task in tasks}
    seen = read_all(trained_on)
    encoder = Encoder(opened.tokenizer, how.template, max_length=1 << 30)
    judged = []
    for task in tasks:
        test = tests[task.name]
        score = evaluate(
            opened.model,
            encoder,
            task,
            test,
            how.writing(task),
            lambda done, total, name=task.name: report(done, total, name),  # type: ignore[misc]
        )
        judged.append(Judged(task, score, overlap(test, seen)))
    return judged


def judge_by_harness(
    opened: Opened, names: Sequence[str], shots: int | None, limit: int | None, batch_size: int
) -> dict[str, dict[str, float]]:
    """The same by tasks of lm-eval; a bare model reads better with a cache."""
    opened.model.config.use_cache = True
    return evaluate_tasks(opened.model, opened.tokenizer, names, shots, limit, batch_size)
