"""The commands `sbora llm …`: the language-model path."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbora_diffusion.cli_llm_count import count
from sbora_diffusion.cli_llm_eval import evaluate
from sbora_diffusion.cli_llm_merge import export, merge
from sbora_diffusion.console import (
    ConfigOption,
    Console,
    DeviceOption,
    JsonOption,
    SetOption,
    quiet_libraries,
    read_settings,
)

if TYPE_CHECKING:
    from sbora_diffusion.core.llm.config import LlmConfig
    from sbora_diffusion.core.llm.training import Done

llm_app = typer.Typer(rich_markup_mode=None)
llm_app.command("eval")(evaluate)
for command in (merge, export, count):
    llm_app.command()(command)

ModelArgument = Annotated[str, typer.Argument(help="A folder or a hub id of a causal model")]
PresetOption = Annotated[
    str | None, typer.Option(help="The paper's settings: commonsense, arithmetic or mmlu")
]


@llm_app.command()
def train(
    model: ModelArgument,
    data: Annotated[list[Path], typer.Argument(help="JSON or JSON Lines; see docs/llm.md")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the adapter")],
    method: Annotated[
        str | None, typer.Option(help="sbora-fa, sbora-fb, mora, lora, dora, any tuner of PEFT")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter")] = None,
    slot: Annotated[
        int | None, typer.Option(help="SBoRA: tasks in different slots merge disjointly")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="nf4: a 4-bit base (QSBoRA, QLoRA, QDoRA)")
    ] = None,
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant", help="NF4: quantize its scales too")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps")] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    preset: PresetOption = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a training that was stopped")
    ] = False,
    save_every: Annotated[
        int, typer.Option(min=0, help="Save the training every N steps, 0: never")
    ] = 100,
    device: DeviceOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter: writes a folder that PEFT loads after `import sbora_diffusion`."""
    quiet_libraries(["transformers"])
    from sbora_diffusion.core.llm.config import LlmConfig, read_preset
    from sbora_diffusion.core.llm.jobs import train_adapter
    from sbora_diffusion.core.llm.training import is_main_process

    console = Console(as_json)
    flags = {"method": method, "rank": rank, "slot": slot, "quantize": quantize}
    flags |= {"double_quant": double_quant, "steps": steps, "seed": seed}
    defaults = read_preset(preset)["training"] if preset else {}
    recipe = read_settings(LlmConfig, config, settings, flags, defaults)
    with console.progress("training") as bar:
        done = train_adapter(
            model,
            data,
            recipe,
            output,
            device=device,
            save_every=save_every,
            resume=resume,
            report=lambda step, steps, loss: bar(step, steps, f"loss {loss:.3f}"),
            tell=console.note,
        )
    if is_main_process():
        _say_trained(console, done, recipe, output)


def _say_trained(console: Console, done: "Done", recipe: "LlmConfig", output: Path) -> None:
    last = done.losses[-1][1] if done.losses else float("nan")
    console.say(
        f"{output}: {recipe.method}, rank {recipe.rank}, {done.trained:,} parameters, "
        f"{done.steps} steps in {done.seconds:.0f} s, loss {last:.3f}"
    )
    console.result(
        {
            "adapter": str(output),
            "trained_parameters": done.trained,
            "steps": done.steps,
            "seconds": round(done.seconds, 2),
            "step_seconds": None if math.isnan(done.step_seconds) else round(done.step_seconds, 4),
            "peak_bytes": done.peak_bytes,
            "losses": done.losses,
            "training": recipe.model_dump(mode="json"),
        }
    )
