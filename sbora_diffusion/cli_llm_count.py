"""The command `sbora llm count`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import Console, JsonOption, quiet_libraries
from sbora_diffusion.core.errors import ConfigError

if TYPE_CHECKING:
    from sbora_diffusion.core.llm.counting import Judged


def count(
    model: Annotated[
        str | None,
        typer.Argument(
            help="llama-7b, llama-13b, llama3-8b, a folder or a hub id; none: the paper"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="As of `sbora llm train`")] = "sbora-fa",
    rank: Annotated[int, typer.Option(min=1)] = 32,
    targets: Annotated[
        str | None, typer.Option(metavar="NAME[,…]", help="Linear layers; by default the family's")
    ] = None,
    complexity: Annotated[
        bool,
        typer.Option("--complexity", help="The paper's Tables 1 and 2 for one layer, corrected"),
    ] = False,
    outputs: Annotated[int, typer.Option(min=1, help="Of that layer")] = 4096,
    inputs: Annotated[int, typer.Option(min=1, help="Of that layer")] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Trained parameters: of a model, or of every row of the paper's three language tables."""
    console = Console(as_json)
    quiet_libraries(["transformers"])
    if complexity:
        _say_complexity(console, outputs, inputs, rank)
    elif model is None:
        _say_tables(console)
    else:
        _say_count(console, model, method, rank, targets)


def _say_count(console: Console, model: str, method: str, rank: int, targets: str | None) -> None:
    from sbora_diffusion.core.llm.counting import count_in
    from sbora_diffusion.core.llm.shapes import config_of

    names = tuple(targets.split(",")) if targets else ()
    found = count_in(config_of(model), method, rank, names)
    console.say(
        f"{model}, {method}, rank {rank}, {', '.join(found.targets)}: {found.trained:,} trained of "
        f"{found.total:,} ({found.trained / found.total:.2%})"
    )
    console.result(
        {
            "model": model,
            "method": method,
            "rank": rank,
            "targets": list(found.targets),
            "trained_parameters": found.trained,
            "base_parameters": found.total,
        }
    )


def _say_tables(console: Console) -> None:
    from sbora_diffusion.core.llm.counting import cells, count_cell, judge, wrong_averages

    all_cells = list(cells())
    with console.progress("counting") as bar:
        judged = []
        for number, cell in enumerate(all_cells, 1):
            judged.append(judge(cell, count_cell(cell)))
            bar(number, len(all_cells), cell.model)
    columns = ["table", "source", "model", "method", "rank", "printed", "counted", "verdict"]
    reasons = list(dict.fromkeys(j.why for j in judged if j.why))
    console.table(columns, [_row(j, reasons) for j in judged])
    for number, why in enumerate(reasons, 1):
        console.say(f"[{number}] {why}")
    averages = wrong_averages()
    for wrong in averages:
        console.say(
            f"misprint: {wrong.place} prints an average of {wrong.printed}; its scores average "
            f"{wrong.average:.2f}"
        )
    console.result(
        {
            "cells": [_document(j) for j in judged],
            "averages": [vars(wrong) for wrong in averages],
        }
    )


def _row(judged: "Judged", reasons: list[str]) -> list[str]:
    cell = judged.cell
    mark = f" [{reasons.index(judged.why) + 1}]" if judged.why else ""
    named = [cell.table, cell.source, cell.model, cell.method, str(cell.rank)]
    return [*named, cell.printed, f"{judged.count:,}", judged.verdict + mark]


def _document(judged: "Judged") -> dict[str, Any]:
    return {
        **vars(judged.cell),
        "count": judged.count,
        "verdict": judged.verdict,
        "why": judged.why,
    }


def _say_complexity(console: Console, outputs: int, inputs: int, rank: int) -> None:
    from sbora_diffusion.core.llm.complexity import TABLE, measure, value

    if rank > min(outputs, inputs):
        raise ConfigError(f"rank {rank} is more than the layer has", "give a lower --rank")
    names = ("trained", "stored", "printed", "multiplications", "additions")
    size = (outputs, inputs, rank)
    rows, documents = [], []
    for cost in TABLE:
        measured = measure(cost.method, *size)
        document = {name: value(getattr(cost, name), *size) for name in names}
        built = {name: getattr(measured, name) for name in vars(measured)}
        rows.append(
            [cost.method, *(f"{getattr(cost, name)} = {document[name]:,}" for name in names)]
        )
        documents.append({"method": cost.method, **document, "measured": built})
        same = all(document[name] == built[name] for name in built)
        console.say(f"{cost.method}: the layer that runs here {'agrees' if same else 'DIFFERS'}")
    console.table(["method", "trained", "stored", "stored (paper)", *names[3:]], rows)
    console.say(
        'stored (paper): Table 1\'s "Total Params", which has FA and FB swapped. Gradients take as '
        "many numbers as are trained. A scale other than 1 adds r (FB) or outputs (FA) products."
    )
    console.result({"outputs": outputs, "inputs": inputs, "rank": rank, "costs": documents})
