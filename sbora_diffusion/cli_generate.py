"""`sbora generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import (
    BaseOption,
    CompileOption,
    ConfigOption,
    Console,
    DeviceOption,
    Dtype,
    DtypeOption,
    GraphsOption,
    JsonOption,
    LibraryOption,
    OffloadOption,
    SetOption,
    open_base,
    read_settings,
)
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from PIL.Image import Image

    from sbora_diffusion.core.folded_set import Weighted
    from sbora_diffusion.diffusion.config import PictureConfig
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline
    from sbora_diffusion.diffusion.regions import Box
    from sbora_diffusion.diffusion.routing import Source


def generate(
    prompt: Annotated[str, typer.Argument(help="With the tokens of the concepts in it")],
    concept: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:WEIGHT]",
            help="A file, or a name in the library or of an example; may be repeated. Concepts of "
            "the library whose token stands in the prompt are found without it.",
        ),
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=x0,y0,x1,y1", help="Where a concept may be, in 0 to 1; one for each"
        ),
    ] = None,
    auto_regions: Annotated[
        bool, typer.Option("--auto-regions", help="Find out where each concept should be")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="A new PNG: one that exists is not replaced. By default picture.png, or the next "
            "that is free of picture_2.png, picture_3.png …",
        ),
    ] = None,
    base: BaseOption = None,
    seed: Annotated[int | None, typer.Option(help="Picture k uses seed + k")] = None,
    num: Annotated[int | None, typer.Option(help="How many pictures")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="How strictly to follow")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, the base's by default")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, the base's by default")] = None,
    negative: Annotated[str | None, typer.Option(help="What not to draw")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.fp32,
    graphs: GraphsOption = True,
    compiled: CompileOption = False,
    offload: OffloadOption = False,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw pictures of a prompt: PNG files with their parameters inside."""
    from sbora_diffusion.diffusion.config import PictureConfig
    from sbora_diffusion.outputs import new_pictures

    console = Console(as_json)
    flags: dict[str, Any] = {"seed": seed, "num": num, "steps": steps, "guidance": guidance}
    flags |= {"negative_prompt": negative, "width": width, "height": height}
    drawing = read_settings(PictureConfig, config, settings, flags)
    files = new_pictures(output, drawing.num)
    boxes = _boxes(region or [], auto_regions)
    running = {
        "device": device, "dtype": dtype, "graphs": graphs, "compiled": compiled,
        "offloaded": offload,
    }  # fmt: skip
    pipeline, active, called = _prepare(
        console, prompt, concept or [], base, Library(library), running
    )
    sampler, placed = _sampler(pipeline, boxes, auto_regions)
    with console.progress("drawing") as bar:
        pictures = pipeline.generate(prompt, **drawing.model_dump(), on_step=bar, sampler=sampler)
    parameters = _save(pipeline, prompt, active, drawing, placed, pictures, files)
    for source in called:
        console.note(f"{source.token} is {source.place}")
    console.say("\n".join(map(str, files)))
    console.result({"files": [str(file) for file in files], "pictures": parameters})


def _prepare(
    console: Console,
    prompt: str,
    specs: list[str],
    reference: str | None,
    library: Library,
    running: dict[str, Any],
) -> tuple["ConceptPipeline", "list[Weighted]", "list[Source]"]:
    """The base with the concepts that --concept and the prompt ask for; what these are, with their
    weights; and those among them that only the prompt asks for."""
    from sbora_diffusion.diffusion.pipeline import ConceptPipeline
    from sbora_diffusion.diffusion.routing import Router
    from sbora_diffusion.known import base_called, sources, unknown_tokens
    from sbora_diffusion.lookup import load_selection

    given = load_selection(specs, library)
    named = next((c.meta.base_name for c, _ in given.concepts if c.meta.base_name), None)
    named = reference or named or base_called(prompt, library) or "pocket"
    pipeline = ConceptPipeline(open_base(named, **running))
    router = Router(pipeline, sources(library, pipeline.base), given.concepts)
    for line in unknown_tokens(router, prompt, library):
        console.warn(line)
    active = router.concepts_for(prompt, given.allow_overlap)
    for name in pipeline.switch(active, given.allow_overlap):
        console.warn(f"{name} was trained on a rounded copy of this base")
    _warn_of_prompt(console, pipeline, prompt)
    return pipeline, active, router.called(prompt)


def _warn_of_prompt(console: Console, pipeline: "ConceptPipeline", prompt: str) -> None:
    from sbora_diffusion.diffusion.prompts import spelled
    from sbora_diffusion.pictures import words_cut_off

    for name in pipeline.unmentioned(prompt):
        token = pipeline.concepts[name].meta.tokens[0].token
        console.warn(f"the prompt does not mention {name}: write {token} where it shall appear")
    if cut := words_cut_off(pipeline.base, spelled(prompt)):
        console.warn(f"the prompt is too long, its end is not read: {cut[:200]!r}")


def _boxes(regions: list[str], auto: bool) -> dict[str, "Box"]:
    from sbora_diffusion.diffusion.regions import parse_regions

    if regions and auto:
        raise ConfigError("--region and --auto-regions exclude each other", "give one of them")
    return parse_regions(regions)


def _sampler(
    pipeline: "ConceptPipeline", boxes: dict[str, "Box"], auto: bool
) -> tuple[Any, dict[str, Any]]:
    """How to draw, None for the usual way, and what the pictures note of it."""
    from sbora_diffusion.diffusion.regions import region_sampler

    if not boxes and not auto:
        return None, {}
    if auto and not pipeline.concepts:
        raise ConfigError("--auto-regions needs a concept", "name one in the prompt")
    return region_sampler(pipeline, boxes)


def _save(
    pipeline: "ConceptPipeline",
    prompt: str,
    concepts: "list[Weighted]",
    drawing: "PictureConfig",
    placed: dict[str, Any],
    pictures: "list[Image]",
    files: list[Path],
) -> list[dict[str, Any]]:
    from sbora_diffusion.pictures import picture_parameters, save_png

    options = drawing.model_dump(exclude={"num", "seed", "width", "height"})
    saved = []
    for k, (picture, file) in enumerate(zip(pictures, files, strict=True)):
        seed = drawing.seed + k
        parameters = picture_parameters(pipeline.base, prompt, concepts, seed=seed, **options)
        if drawing.width or drawing.height:
            parameters |= {"width": picture.width, "height": picture.height}
        save_png(picture, file, {**parameters, **placed})
        saved.append({**parameters, **placed})
    return saved
