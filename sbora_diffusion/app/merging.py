"""What the tabs Merge, Evaluate and Export do without their page: checks, and `sbora` commands."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sbora_diffusion.app.job_store import Job, JobStore
from sbora_diffusion.app.workspace import Workspace
from sbora_diffusion.core.errors import ConfigError, ConflictError, DataError
from sbora_diffusion.core.schema import NAME_PATTERN
from sbora_diffusion.diffusion.concepts import image_files

FORMS = {
    "A model for diffusers": "model", "One LoRA": "lora", "A concept set": "set",
}  # fmt: skip
TOOLS = {
    "ComfyUI, A1111, Forge (kohya)": "kohya", "diffusers": "diffusers", "PEFT": "peft",
    "A whole model": "checkpoint",
}  # fmt: skip
SHIPPED = (Path(__file__).parents[1] / "demo_concepts", Path(__file__).parents[2] / "concepts")
"""Reference pictures of the examples: in the installed package, and in a checkout."""


@dataclass(frozen=True)
class Verdict:
    """May these concepts live in one model?

    Attributes:
        problems, notes: one line each.
        prices: what they own together.
        names: of the concepts, for `shared`.
        shared: pair of names → how many indices they share, over all layers.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    prices: tuple[str, ...]
    names: tuple[str, ...]
    shared: Mapping[frozenset[str], int]


def judge(workspace: Workspace, selection: Mapping[str, float]) -> Verdict:
    """All that can be known without running a model.

    Raises:
        ConfigError: nothing is chosen.
        SboraError: a file cannot be read.
    """
    from sbora_diffusion.check import members, prices, static_findings
    from sbora_diffusion.lookup import load_concepts

    specs = _specs(workspace, selection)
    group = members([(s, *f) for s in specs for f in load_concepts([s], workspace.library)])
    findings = static_findings(group)
    shared = {
        frozenset(f.facts["concepts"]): sum(f.facts["layers"].values())
        for f in findings
        if f.kind == "overlap"
    }
    return Verdict(
        tuple(f.text for f in findings if f.blocks),
        tuple(f.text for f in findings if not f.blocks),
        tuple(prices(group)),
        tuple(member.label for member in group),
        shared,
    )


def submit_check(workspace: Workspace, store: JobStore, selection: Mapping[str, float]) -> Job:
    """Predict what a merge changes: `sbora check`.

    Raises:
        ConflictError: they cannot be merged at all.
    """
    if problems := judge(workspace, selection).problems:
        raise ConflictError(problems[0], "`Check` says all that speaks against it")
    plot = _fresh(workspace, f"crosstalk-{_joined(selection)}", ".png")
    words = [*check_words(workspace, selection), "--plot", str(plot)]
    return store.submit("check", _title(selection), words, plot)


def check_words(workspace: Workspace, selection: Mapping[str, float]) -> list[str]:
    """The command that tells what `judge` tells, and more."""
    return _with_library(["check", *_specs(workspace, selection)], workspace)


def submit_merge(
    workspace: Workspace,
    store: JobStore,
    selection: Mapping[str, float],
    form: str,
    calibrate: bool,
    name: str,
) -> Job:
    """Put concepts together: `sbora merge`.

    Args:
        form: "model", "lora" or "set".
        calibrate: fit a model of several so that none speaks on another's prompts.

    Raises:
        ConfigError: nothing is chosen, or the name cannot be a file's.
        ConflictError: they cannot be merged, or the output is there already.
    """
    if problems := judge(workspace, selection).problems:
        raise ConflictError(problems[0], "`Check` says all that speaks against it")
    output = _output(workspace, name or _joined(selection), ".safetensors" if form == "set" else "")
    words = ["merge", *_specs(workspace, selection), "--as", form, "-o", str(output)]
    if form == "model" and len(selection) > 1 and not calibrate:
        words.append("--no-calibrate")
    return store.submit("merge", output.stem, _with_library(words, workspace), output)


def submit_export(
    workspace: Workspace, store: JobStore, selection: Mapping[str, float], to: str, name: str
) -> Job:
    """Write concepts for another tool: `sbora export`.

    Raises:
        see `submit_merge`.
    """
    output = _output(workspace, name or f"{_joined(selection)}-{to}", "")
    words = ["export", *_specs(workspace, selection), "--to", to, "-o", str(output)]
    return store.submit("export", output.stem, _with_library(words, workspace), output)


def submit_evaluation(
    workspace: Workspace, store: JobStore, key: str, weight: float, num: int, steps: int
) -> Job:
    """Measure how well a concept was learned: `sbora evaluate`.

    Raises:
        ConfigError: there is no such concept.
        DataError: its reference pictures are not here.
    """
    card = workspace.card(key)
    references = _references(workspace, card.name)
    sheet = _fresh(workspace, f"evaluation-{card.name}", ".png")
    words = ["evaluate", *workspace.specs({key: weight}), "--references", str(references)]
    words += ["--num", str(int(num)), "--steps", str(int(steps)), "-o", str(sheet)]
    return store.submit("evaluate", card.name, _with_library(words, workspace), sheet)


def _references(workspace: Workspace, name: str) -> Path:
    for place in (workspace.subjects, *SHIPPED):
        if (place / name).is_dir() and image_files(place / name):
            return place / name
    raise DataError(
        f"The pictures that {name} was learned from are not here",
        "save them under Concepts with the same name",
    )


def _specs(workspace: Workspace, selection: Mapping[str, float]) -> list[str]:
    if not selection:
        raise ConfigError("No concept is chosen", "switch on one or more")
    return workspace.specs(selection)


def _with_library(words: list[str], workspace: Workspace) -> list[str]:
    return [*words, *workspace.base.option, "--library", str(workspace.library.path)]


def _joined(selection: Mapping[str, float]) -> str:
    """A name of all concepts: letters that any file may have."""
    words = (re.sub(r"[^A-Za-z0-9_-]+", "", key) for key in sorted(selection))
    return "-".join(words)[:48] or "concepts"


def _title(selection: Mapping[str, float]) -> str:
    return " + ".join(sorted(selection))


def _output(workspace: Workspace, name: str, suffix: str) -> Path:
    if not re.match(NAME_PATTERN, name.strip()):
        raise ConfigError(f"{name!r} cannot be a name", "take letters, digits, - and _")
    path = workspace.outputs / f"{name.strip()}{suffix}"
    if path.exists():
        raise ConflictError(f"There is {path.name} already", "take another name")
    return path


def _fresh(workspace: Workspace, stem: str, suffix: str) -> Path:
    """A file that is not there yet."""
    numbers = (f"-{k}" if k else "" for k in range(10_000))
    paths = (workspace.outputs / f"{stem}{number}{suffix}" for number in numbers)
    return next(path for path in paths if not path.exists())


def product_pictures(job: Job | None) -> Sequence[tuple[Path, str]]:
    """The picture that a job made, if it made one."""
    made = Path(job.product) if job else Path()
    return [(made, "")] if made.suffix == ".png" and made.is_file() else []
