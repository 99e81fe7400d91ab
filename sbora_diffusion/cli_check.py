"""The command that says whether concepts can live in one model, and what a merge does to them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbora_diffusion.console import (
    OK,
    WRONG_INPUT,
    BaseOption,
    ConfigOption,
    Console,
    DeviceOption,
    JsonOption,
    LibraryOption,
    SetOption,
    open_base,
    quiet_libraries,
    read_settings,
)
from sbora_diffusion.core.errors import ConfigError, SboraError
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from sbora_diffusion.check import Finding, Member
    from sbora_diffusion.core.prediction import Forecast
    from sbora_diffusion.diffusion.bases import Base
    from sbora_diffusion.diffusion.moments import CalibrateConfig
    from sbora_diffusion.renames import Rename

Group = list["Member"]


def check(
    concepts: Annotated[list[str], typer.Argument(metavar="FILE[:WEIGHT]…")],
    base: BaseOption = None,
    allow_overlap: Annotated[bool, typer.Option(help="Accept shared indices")] = False,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=<TOKEN>", help="Write a copy with another token; NAME may be a FILE"
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Make all renames that it offers")] = False,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for renamed copies")
    ] = Path(),
    crosstalk: Annotated[
        bool,
        typer.Option(
            "--crosstalk/--no-crosstalk",
            help="Draw with each concept and predict what a merge changes",
        ),
    ] = True,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Crosstalk as heat maps")
    ] = None,
    device: DeviceOption = None,
    library: LibraryOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """May these concepts be merged? Base, indices, tokens, and what each would lose."""
    from sbora_diffusion.check import static_findings

    console = Console(as_json)
    _check_options(crosstalk, plot, config, settings)
    group = _load(concepts, Library(library))
    copies = _rename(console, group, rename or [], apply, output)
    group = _with_copies(group, copies)
    model = _base_at_hand(console, base, device, group) if crosstalk else None
    findings = static_findings(group, model.fingerprint if model else None, allow_overlap)
    findings += _known_words(group, model)
    blocked = any(finding.blocks for finding in findings)
    _say_static(console, group, findings)
    found = None
    if model and not blocked and len(group) > 1:
        found = _forecast(console, model, group, allow_overlap, config, settings)
        _say_forecast(console, found)
        if plot:
            _draw(console, found, plot)
    elif crosstalk and (plot or len(group) > 1):
        console.say(
            "crosstalk was left out: it takes two concepts that can be merged, and their own base"
        )
    console.result(_document(group, copies, findings, found, not blocked))
    raise typer.Exit(WRONG_INPUT if blocked else OK)


def _check_options(
    crosstalk: bool, plot: Path | None, config: Path | None, settings: list[str] | None
) -> None:
    """Wrong options are refused before any work."""
    from sbora_diffusion.outputs import check_picture_output

    if plot and not crosstalk:
        raise ConfigError("--plot draws crosstalk", "leave out --no-crosstalk or --plot")
    if plot:
        check_picture_output(plot)
    if crosstalk:
        _drawing(config, settings)


def _drawing(config: Path | None, settings: list[str] | None) -> "CalibrateConfig":
    """The settings of `sbora merge`, whose result is predicted."""
    quiet_libraries()
    from sbora_diffusion.diffusion.moments import CalibrateConfig

    return read_settings(CalibrateConfig, config, settings, {})


def _load(specs: list[str], library: Library) -> Group:
    """Concepts with the place that each came from; a set of several shares one place."""
    from sbora_diffusion.check import members
    from sbora_diffusion.lookup import load_concepts

    return members([(s, *found) for s in specs for found in load_concepts([s], library)])


def _rename(
    console: Console, group: Group, asked: list[str], apply: bool, folder: Path
) -> "dict[str, tuple[Path, Rename]]":
    """Write the copies that were asked for; label → (file, what changed)."""
    from sbora_diffusion.renames import asked_rename, offered_renames, write_renamed

    renames = [asked_rename(group, text) for text in asked]
    if apply:
        done = {rename.member.label for rename in renames}
        renames += [offer for offer in offered_renames(group) if offer.member.label not in done]
    copies = write_renamed(renames, folder)
    for file, rename in copies.values():
        console.say(f"{file}: a copy of {rename.member.label} that is called {rename.called}")
    return copies


def _with_copies(group: Group, copies: "dict[str, tuple[Path, Rename]]") -> Group:
    """The copies in the place of their originals."""
    from sbora_diffusion.check import members
    from sbora_diffusion.core.concept import read_concept

    given = []
    for member in group:
        place, concept = member.place, member.concept
        if member.label in copies:
            file = copies[member.label][0]
            place, concept = str(file), read_concept(file)
        given.append((place, concept, member.weight))
    return members(given)


def _base_at_hand(
    console: Console, reference: str | None, device: str | None, group: Group
) -> "Base | None":
    """The base to measure on; a base that cannot be loaded costs the crosstalk, not the check."""
    named = (member.concept.meta.base_name for member in group)
    reference = reference or next(filter(None, named), None)
    if reference is None:
        console.warn("the concept files do not name their base: give it with --base")
        return None
    try:
        return open_base(reference, device)
    except SboraError as error:
        console.warn(str(error))
        return None


def _known_words(group: Group, model: "Base | None") -> "list[Finding]":
    from sbora_diffusion.check import Finding

    known = model.pipeline.tokenizer.get_vocab() if model else {}
    return [
        Finding("vocabulary", True, f"{member.label}: the base itself knows {token}; rename it")
        for member in group
        for token in member.tokens
        if token in known
    ]


def _forecast(
    console: Console,
    model: "Base",
    group: Group,
    allow_overlap: bool,
    config: Path | None,
    settings: list[str] | None,
) -> "Forecast":
    from sbora_diffusion.diffusion.calibrated import Calibrated

    weighted = [(member.concept, member.weight) for member in group]
    labels = [member.label for member in group]
    with console.progress("predicting") as bar:
        empty = Calibrated(model, (), _drawing(config, settings), allow_overlap, bar)
        return empty.forecast(weighted, labels)


def _say_static(console: Console, group: Group, findings: "list[Finding]") -> None:
    from sbora_diffusion.check import prices
    from sbora_diffusion.renames import offered_renames

    columns = ["concept", "token", "variant", "rank", "indices", "weight", "from"]
    console.table(columns, [member.row() for member in group])
    for line in prices(group):
        console.say(line)
    for finding in findings:
        console.say(f"{'problem' if finding.blocks else 'note'}: {finding.text}")
    if any(finding.kind == "overlap" and finding.blocks for finding in findings):
        console.say("a way out: train one of those again in a free slot, or --allow-overlap")
    for offer in offered_renames(group):
        console.say(f"a way out: --rename {offer.option}, or --apply")
    problems = sum(finding.blocks for finding in findings)
    console.say(
        f"not mergeable: {problems} problem{'s' * (problems > 1)}" if problems else "mergeable"
    )


def _say_forecast(console: Console, found: "Forecast") -> None:
    from sbora_diffusion.prediction_report import (
        EXPLANATION,
        prediction_columns,
        prediction_rows,
        verdict,
    )

    for line in EXPLANATION:
        console.say(line)
    console.table(prediction_columns(), prediction_rows(found))
    for line in verdict(found):
        console.say(line)


def _draw(console: Console, found: "Forecast", plot: Path) -> None:
    from sbora_diffusion.crosstalk_report import heat_maps
    from sbora_diffusion.pictures import save_png
    from sbora_diffusion.plots import heat_picture

    save_png(heat_picture(heat_maps(found.crosstalk)), plot, {})
    console.say(str(plot))


def _document(
    group: Group,
    copies: "dict[str, tuple[Path, Rename]]",
    findings: "list[Finding]",
    found: "Forecast | None",
    mergeable: bool,
) -> dict[str, Any]:
    from sbora_diffusion.crosstalk_report import crosstalk_document
    from sbora_diffusion.prediction_report import prediction_document
    from sbora_diffusion.renames import offered_renames

    return {
        "mergeable": mergeable,
        "concepts": [member.document() for member in group],
        "findings": [
            {"kind": f.kind, "blocks": f.blocks, "text": f.text, **f.facts} for f in findings
        ],
        "offered_renames": [offer.document() for offer in offered_renames(group)],
        "renamed": [{**rename.document(), "file": str(file)} for file, rename in copies.values()],
        "crosstalk": crosstalk_document(found.crosstalk) if found else None,
        "prediction": prediction_document(found) if found else None,
    }
