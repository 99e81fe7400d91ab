"""The command `sbora llm eval`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sbora_diffusion.console import Console, DeviceOption, JsonOption, quiet_libraries
from sbora_diffusion.core.errors import ConfigError


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder, also a merged one, or a hub id")],
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with <task>/test.json in the LLM-Adapters format"),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="A trained adapter of this model")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK[,…]", help="e.g. gsm8k,SVAMP; or lm-eval's, e.g. mmlu"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Tasks and beams of commonsense, arithmetic or mmlu")
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="1: greedy; the paper has 4")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer")] = None,
    template: Annotated[str | None, typer.Option(help="The adapter's by default")] = None,
    trained_on: Annotated[
        list[Path] | None, typer.Option(help="Training data; test questions in it are counted")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions of each task")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32")] = "fp32",
    texts: Annotated[Path | None, typer.Option(help="Write what the model answered here")] = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy on commonsense and arithmetic tasks in the paper's protocol, or on lm-eval's."""
    quiet_libraries(["transformers"])
    from sbora_diffusion.core.llm.config import read_preset
    from sbora_diffusion.core.llm.judging import Judging, judge, judge_by_harness, open_model
    from sbora_diffusion.core.llm.prompts import check_template

    console = Console(as_json)
    chosen = read_preset(preset) if preset else {}
    names = tasks.split(",") if tasks else chosen.get("tasks", [])
    if not names:
        raise ConfigError("no task is named", "give --tasks or --preset")
    opened = open_model(model, adapter, dtype, device)
    if data is None:
        figures = judge_by_harness(opened, names, chosen.get("shots"), limit, batch_size)
        for task, found in figures.items():
            console.say(f"{task}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
        console.result({"model": model, "tasks": figures})
        return
    how = Judging(
        check_template(template) if template else opened.template,
        beams or chosen.get("beams", 1),
        new_tokens or chosen.get("max_new_tokens"),
        batch_size,
        limit,
    )
    with console.progress("answering") as bar:
        judged = judge(opened, data, names, how, trained_on or [], bar)
    rows = [
        [j.score.task, f"{j.score.accuracy:.1%}", f"{j.score.right}/{j.score.total}", j.remark]
        for j in judged
    ]
    console.table(["task", "accuracy", "right", ""], rows)
    if texts:
        lines = [{"task": j.score.task, "texts": j.score.texts} for j in judged]
        texts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    console.result({"model": model, "protocol": vars(how), "tasks": [_document(j) for j in judged]})


def _document(judged: Any) -> dict[str, Any]:
    score = judged.score
    return {
        "task": score.task,
        "accuracy": score.accuracy,
        "right": score.right,
        "answered": score.answered,
        "total": score.total,
        "contaminated": judged.task.contaminated,
        "trained_questions": judged.trained,
    }
