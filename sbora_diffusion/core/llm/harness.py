"""Tasks of lm-eval (EleutherAI's evaluation harness) on a model with or without an adapter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbora_diffusion.core.errors import ConfigError


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    shots: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    tasks_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Figures of each task, by their names in lm-eval.

    Args:
        tasks: e.g. "mmlu"; their data comes from the hub, or from local files that the task names.
        tasks_folder: where further tasks are described, as lm-eval's `--include_path`.

    Raises:
        ConfigError: lm-eval is missing, or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"tasks of lm-eval need it: {error}", "pip install 'sbora-diffusion[llm]'"
        ) from error
    manager = TaskManager(include_path=str(tasks_folder) if tasks_folder else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {unknown[0]!r}", "see `lm-eval ls tasks`")
    found = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return {
        task: {key.partition(",")[0]: value for key, value in figures.items() if _is_figure(value)}
        for task, figures in found["results"].items()
    }


def _is_figure(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)
