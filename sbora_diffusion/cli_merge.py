"""The command that puts concepts together: `sbora merge`."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import (
    BaseOption,
    ConfigOption,
    Console,
    DeviceOption,
    Dtype,
    JsonOption,
    LibraryOption,
    SetOption,
    open_base,
    quiet_libraries,
    read_settings,
)
from sbora_diffusion.core.errors import ConfigError, ResourceError
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from sbora_diffusion.core.concept_set import ConceptSet
    from sbora_diffusion.diffusion.bases import Base
    from sbora_diffusion.diffusion.merging import Merged
    from sbora_diffusion.diffusion.moments import CalibrateConfig


class Form(StrEnum):
    model = "model"
    set = "set"
    lora = "lora"


def merge(
    concepts: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]…")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The new folder (model, lora) or file (set)")
    ],
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="model: a folder for stock diffusers; set: one file with all concepts, which "
            "merge and generate take like a concept; lora: one LoRA and its token embeddings",
        ),
    ] = Form.model,
    base: BaseOption = None,
    allow_overlap: Annotated[bool, typer.Option(help="Accept shared indices")] = False,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Draw with each concept alone, and fit the model's updates so that none speaks on "
            "another's prompts; by default if a model gets two concepts or more",
        ),
    ] = None,
    refine: Annotated[
        bool | None,
        typer.Option(
            "--refine/--no-refine",
            help="After the fit, train the model's updates until it predicts what each concept "
            "alone predicts; by default on a GPU, since a CPU takes a quarter of an hour and more",
        ),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    device: DeviceOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Numbers that are written")] = Dtype.fp32,
    library: LibraryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put concepts together in one model, one concept set or one LoRA."""
    from sbora_diffusion.core.concept_set import ConceptSet
    from sbora_diffusion.lookup import load_selection

    console = Console(as_json)
    loaded = load_selection(concepts, Library(library))
    selection = ConceptSet(loaded.concepts, allow_overlap or loaded.allow_overlap)
    several = form is Form.model and len(selection.concepts) > 1
    wanted = several if calibrate is None else calibrate
    calibration = _calibration(form, wanted, refine, config, settings)
    if form is Form.model:
        facts = _write_model(console, selection, output, base, device, dtype, calibration, refine)
    elif form is Form.set:
        facts = _write_set(console, selection, output, dtype)
    else:
        facts = _write_lora(console, selection, output, dtype)
    listed = [{"name": c.meta.name, "weight": weight} for c, weight in selection.concepts]
    common = {"as": str(form), "dtype": str(dtype), "allow_overlap": selection.allow_overlap}
    console.result({**facts, **common, "concepts": listed})


def _calibration(
    form: Form,
    wanted: bool,
    refine: bool | None,
    config: Path | None,
    settings: list[str] | None,
) -> "CalibrateConfig | None":
    """Settings of the calibration, None without one."""
    if wanted and form is not Form.model:
        raise ConfigError(
            f"--calibrate fits a whole model, not --as {form}", "leave one of the two out"
        )
    if not wanted:
        if config or settings:
            raise ConfigError("settings are for calibration, which is off", "add --calibrate")
        if refine:
            raise ConfigError(
                "--refine goes on from a calibration, which is off", "add --calibrate"
            )
        return None
    quiet_libraries()
    from sbora_diffusion.diffusion.moments import CalibrateConfig

    found = read_settings(CalibrateConfig, config, settings, {})
    if refine is not None and "refine" in found.model_fields_set and bool(found.refine) != refine:
        option = "--refine" if refine else "--no-refine"
        raise ConfigError(f"{option} and refine={found.refine} exclude each other", "drop one")
    return found


def _write_model(
    console: Console,
    selection: "ConceptSet",
    output: Path,
    base: str | None,
    device: str | None,
    dtype: Dtype,
    calibration: "CalibrateConfig | None",
    refine: bool | None,
) -> dict[str, Any]:
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.outputs import check_model_output

    check_model_output(output)
    named = base or next(
        (c.meta.base_name for c, _ in selection.concepts if c.meta.base_name), None
    )
    if named is None:
        raise ConfigError("the concept files do not name their base", "give it with --base")
    model = open_base(named, device, deterministic=calibration is not None)
    if calibration is not None:
        calibration = _refining(calibration, refine, model)
    merged = _merged(console, selection, model, calibration)
    if merged.rounded:
        console.warn("some concepts were trained on a rounded copy of this base")
    merged.save(output, DTYPES[dtype])
    console.say(f"{output}: {len(selection.concepts)} concepts in one model of {named}, {dtype}")
    console.say(f'next: sbora generate "{_prompt(selection)}" --base {output}')
    used = calibration and calibration.model_dump(mode="json")
    facts = {"folder": str(output), "base": named, "rounded_base": merged.rounded}
    return {**facts, "calibration": used}


def _refining(calibration: "CalibrateConfig", refine: bool | None, base: "Base") -> Any:
    """The settings with the usual descent, where it is wanted and they do not say another."""
    from sbora_diffusion.diffusion.refinement import STEPS

    wanted = base.device.type != "cpu" if refine is None else refine
    if not wanted or "refine" in calibration.model_fields_set:
        return calibration
    return calibration.model_copy(update={"refine": STEPS})


def _merged(
    console: Console,
    selection: "ConceptSet",
    base: "Base",
    calibration: "CalibrateConfig | None",
) -> "Merged":
    """The base with the concepts folded in."""
    from sbora_diffusion.diffusion.calibrated import Calibrated
    from sbora_diffusion.diffusion.merging import Merged

    concepts = selection.concepts
    if calibration is None:
        return Merged(base, concepts, selection.allow_overlap)
    start = perf_counter()
    with console.progress("calibrating") as bar, _told_when_memory_is_full(calibration):
        merged = Calibrated(base, concepts, calibration, selection.allow_overlap, bar)
    refined = f", and refined in {calibration.refine} steps" if calibration.refine else ""
    console.say(
        f"calibrated{refined} in {perf_counter() - start:.0f} s on {len(calibration.prompts)} "
        f"prompts of each concept and {calibration.generic} without any"
    )
    return merged


@contextmanager
def _told_when_memory_is_full(calibration: "CalibrateConfig") -> Iterator[None]:
    """Say what takes less of it."""
    from sbora_diffusion.checkpointing import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError("memory is full", _less_memory(calibration)) from error


def _less_memory(calibration: "CalibrateConfig") -> str:
    ways = {
        "-s refine_gradient_checkpointing=true": not calibration.refine_gradient_checkpointing,
        "-s refine_mixed_precision=bf16": calibration.refine_mixed_precision == "no",
        "--no-refine": True,
    }
    found = [way for way, helps in ways.items() if helps and calibration.refine]
    return f"try {', '.join([*found, 'another --device'])}"


def _write_set(
    console: Console, selection: "ConceptSet", output: Path, dtype: Dtype
) -> dict[str, Any]:
    from sbora_diffusion.core.concept_set import rounded_concept, write_concept_set
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.outputs import check_concept_output, make_parent

    check_concept_output(output)
    if output.exists():
        console.warn(f"{output} exists and is replaced")
    make_parent(output)
    rounded = [(rounded_concept(c, DTYPES[dtype]), weight) for c, weight in selection.concepts]
    digest = write_concept_set(output, rounded, selection.allow_overlap)
    console.say(f"{output}: {len(rounded)} concepts in one set, {output.stat().st_size} bytes")
    console.say(f'next: sbora generate "{_prompt(selection)}" --concept {output}')
    return {"file": str(output), "digest": digest}


def _write_lora(
    console: Console, selection: "ConceptSet", output: Path, dtype: Dtype
) -> dict[str, Any]:
    quiet_libraries()
    from sbora_diffusion.diffusion.bases import DTYPES
    from sbora_diffusion.diffusion.formats import LORA_FILE, write_lora
    from sbora_diffusion.outputs import check_model_output

    check_model_output(output)
    files = write_lora(output, selection.concepts, selection.allow_overlap, DTYPES[dtype])
    names = [str(file.relative_to(output)) for file in files]
    console.say(f"{output / LORA_FILE}: {len(selection.concepts)} concepts in one LoRA, {dtype}")
    console.say(f"in diffusers: load_lora_weights({str(output)!r}) and, for the tokens,")
    console.say(f"load_textual_inversion of {', '.join(names)} in that folder")
    return {"folder": str(output), "lora": LORA_FILE, "embeddings": names}


def _prompt(selection: "ConceptSet") -> str:
    tokens = [entry.token for concept, _ in selection.concepts for entry in concept.meta.tokens]
    return " next to ".join(tokens)
