"""Each method's learning rates and steps, by as many trials for each, on subjects of their own."""

import json
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from sbora_diffusion.comparison.lines import Line, unique
from sbora_diffusion.comparison.measuring import Measures, worth
from sbora_diffusion.comparison.preset import Changes, Preset
from sbora_diffusion.comparison.trained import train_all
from sbora_diffusion.comparison.work import Work
from sbora_diffusion.core.errors import ConfigError, FormatError, NonFiniteError
from sbora_diffusion.evaluation.protocols import RAW_COSINE

WHAT = "learning rates and steps of each method, chosen on subjects that no table has"
RULE = "text alignment + mean image alignment, raw cosines, mean over the subjects"


def run_tuning(work: Work) -> None:
    """Train and judge every trial that the record does not have; trials that became NaN count.

    Args:
        work: of the subjects that are tuned on, with nothing tuned yet.

    Raises:
        ConfigError: there are no subjects to tune on.
        ConflictError: the record is of another setting.
    """
    if not work.subjects:
        raise ConfigError(
            f"preset {work.preset.name} names no subjects to tune on", "set tuning.subjects"
        )
    jobs = work.part.share(trials_of(work.preset, work.entries))
    todo = [(n, k, changes, left) for n, k, changes in jobs if (left := _left(work, n, k, changes))]
    if not todo:
        return
    measures = work.measures(work.preset.tuning.num, by_group=False)
    work.progress.begin(sum(len(left) for *_, left in todo))
    with work.until_the_limit():
        for name, trial, changes, left in todo:
            work.progress.say(f"tuning {name}, trial {trial}")
            _do(work, measures, name, changes, left)


def trials_of(preset: Preset, entries: Sequence[str]) -> list[tuple[str, int, dict[str, Any]]]:
    """(entry, number of the trial, what it changes) of all entries that have a grid."""
    grids = {name: grid for name in entries if (grid := preset.methods[name].grid) is not None}
    return [
        (name, k, changes)
        for name, grid in grids.items()
        for k, changes in enumerate(preset.tuning.trials(grid))
    ]


def _left(work: Work, name: str, trial: int, changes: Changes) -> list[dict[str, Any]]:
    num, seed = work.preset.tuning.num, work.seeds[0]
    heads = [work.line(name, c, seed, num, changes, trial=trial) for c in work.subjects]
    return work.left([{**head, "changes": changes} for head in heads])


def _do(
    work: Work,
    measures: Measures,
    name: str,
    changes: Changes,
    heads: Sequence[dict[str, Any]],
) -> None:
    began, how, seed = time.monotonic(), work.preset.methods[name].how, work.seeds[0]
    subjects = {head["concept"]: work.subjects[head["concept"]] for head in heads}
    config = work.preset.config(name, seed, changes)
    try:
        trained = train_all(how, work.base, subjects, work.slots, config, work.preset.at_once)
    except NonFiniteError as error:
        for head in heads:
            work.finish(head, began, {"broken": f"training: {error.problem}"})
        return
    for head in heads:
        own = trained[head["concept"]]
        found: dict[str, Any] = {"training": own.record()}
        try:
            with how.alone(work.base, own.concept):
                words = {head["concept"]: how.words(own.concept)}
                found["alone"] = measures.figures(words)[head["concept"]]
        except NonFiniteError as error:
            found["broken"] = error.problem
        work.finish(head, began, found)
        began = time.monotonic()  # the first line has the training's time, too


def tuned_record(preset: Preset, lines: Sequence[Line]) -> dict[str, Any]:
    """Each method's winner, where all its trials are complete; the others' are not compared.

    Raises:
        FormatError: there are no lines of this preset.
    """
    own = [line for line in unique(lines) if line["preset"] == preset.name and "trial" in line]
    if not own:
        raise FormatError(f"there is no trial of preset {preset.name}", "run `sbora bench tune`")
    found = {}
    for name in dict.fromkeys(name for name, *_ in trials_of(preset, list(preset.methods))):
        trials = _trials(preset, name, [line for line in own if line["method"] == name])
        if whole := [trial for trial in trials if trial["worth"] is not None]:
            best = max(whole, key=lambda trial: trial["worth"])
            found[name] = {"settings": best["changes"], "worth": best["worth"], "trials": trials}
    runs = {line["run"]["command"]: line["run"] for line in own}
    seconds = {c: sum(_seconds(x) for x in own if x["run"]["command"] == c) for c in runs}
    first = next(iter(runs.values()))
    return {
        "what": WHAT,
        "preset": preset.name,
        **{key: first[key] for key in ("date", "commit", "device", "versions")},
        "rule": RULE,
        "subjects": list(dict.fromkeys(line["concept"] for line in own)),
        "setting": {k: v for k, v in own[0]["setting"].items() if k not in ("config", "slot")},
        "methods": found,
        "runs": [{**run, "seconds": round(seconds[c], 1)} for c, run in runs.items()],
    }


def _seconds(line: Line) -> float:
    return float(line["run"]["seconds"])


def _trials(preset: Preset, name: str, lines: Sequence[Line]) -> list[dict[str, Any]]:
    """All trials of an entry; none if one is missing or incomplete."""
    found = []
    for _, number, changes in trials_of(preset, [name]):
        own = [x for x in lines if x["trial"] == number and x["changes"] == changes]
        if {line["concept"] for line in own} != set(preset.tuning.subjects):
            return []
        found.append({"changes": changes, **_worth(own)})
    return found


def _worth(lines: Sequence[Line]) -> dict[str, Any]:
    """Means over the subjects; None if a picture of one is broken."""
    if any("broken" in line for line in lines):
        return {"worth": None, "text_alignment": None, "image_alignment": None}
    means = [line["alone"][RAW_COSINE.name] for line in lines]
    images = means[0]["image_alignment"]
    return {
        "worth": round(fmean(worth(line["alone"]) for line in lines), 4),
        "text_alignment": round(fmean(m["text_alignment"] for m in means), 4),
        "image_alignment": {
            k: round(fmean(m["image_alignment"][k] for m in means), 4) for k in images
        },
    }


def read_tuned(preset: Preset) -> dict[str, Changes]:
    """Entry → the settings that its tuning found, or those of the entry that it is tuned as.

    Entries without any have their recipes; so have all where there is no file.

    Raises:
        FormatError: the file is something else, or of another preset.
    """
    file = preset.tuned
    if file is None or not file.exists():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        known = record["preset"] == preset.name and record["what"] == WHAT
        settings = {name: found["settings"] for name, found in record["methods"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known = False
    if not known:
        raise FormatError(
            f"{file} is no record of tuning preset {preset.name}", "write it by `sbora bench tune`"
        )
    named = {name: entry.tuned_as or name for name, entry in preset.methods.items()}
    return {name: settings[source] for name, source in named.items() if source in settings}
