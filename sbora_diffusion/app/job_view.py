"""A job as HTML: how far it is, its loss as a curve, what it says."""

import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sbora_diffusion.app.job_store import Job

WORDS = {
    "queued": "waits for its turn", "running": "runs", "done": "is done", "stopped": "was stopped",
    "failed": "failed",
}  # fmt: skip
WIDTH, HEIGHT, MARGIN = 600, 160, 6
_LOSS = re.compile(r"loss ([\d.]+)")


def job_list(jobs: Sequence[Job], chosen: str | None) -> str:
    """All jobs as a table for people."""
    if not jobs:
        return '<p class="empty">Nothing has been started yet.</p>'
    rows = "".join(_row(job, job.id == chosen) for job in jobs[:8])
    return f'<table class="jobs"><tbody>{rows}</tbody></table>'


def job_detail(job: Job | None, empty: str) -> str:
    """One job: bar, time left, curve, warnings; without one, a text for the empty place."""
    if job is None:
        return f'<p class="empty">{empty}</p>'
    reports = job.progress()
    parts = [_heading(job), _bar(job, reports)]
    if job.kind == "train":
        parts.append(loss_curve(losses(reports)))
    if job.standing.message:
        parts.append(f'<p class="problem">{html.escape(job.standing.message)}</p>')
    parts += [f'<p class="note">{html.escape(w)}</p>' for w in job.result().get("warnings", [])]
    return f'<div class="job" data-state="{job.standing.state}">{"".join(parts)}</div>'


def samples(job: Job | None) -> list[tuple[Path, str]]:
    """Sample pictures of a training and their captions, the newest first."""
    if job is None or job.kind != "train":
        return []
    product = Path(job.product)
    folder = product.with_name(f"{product.stem}.samples")
    since = job.standing.began or 0.0
    files = sorted(folder.glob("step_*.png"), reverse=True) if folder.is_dir() else []
    fresh = [file for file in files if job.standing.resumed or file.stat().st_mtime >= since]
    return [(file, f"step {int(file.stem.split('_')[1])}") for file in fresh]


def losses(reports: Sequence[dict[str, Any]]) -> dict[int, float]:
    """Step → loss; a step that was made again counts as it was made last."""
    found = ((report["done"], _LOSS.search(report["note"])) for report in reports)
    return {step: float(match[1]) for step, match in found if match}


def loss_curve(points: dict[int, float]) -> str:
    """The loss over the steps, smoothed over a tenth of them, in the colours of the page."""
    smooth = _smoothed([points[step] for step in sorted(points)])
    low, high = (min(smooth), max(smooth)) if smooth else (0.0, 1.0)
    line = _polyline(smooth, low, max(high - low, 1e-9))
    label = f"loss {smooth[-1]:.3f}" if smooth else "the loss appears here"
    return (
        f'<figure class="loss"><svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" '
        f'role="img" aria-label="{label}">{line}</svg><figcaption>{label}</figcaption></figure>'
    )


def remaining(reports: Sequence[dict[str, Any]]) -> float | None:
    """Seconds that are left, at the pace of the last reports; None if that is not known."""
    recent = [report for report in reports[-40:] if report["what"] == reports[-1]["what"]]
    if len(recent) < 2:
        return None
    steps = recent[-1]["done"] - recent[0]["done"]
    seconds = recent[-1]["time"] - recent[0]["time"]
    return (recent[-1]["total"] - recent[-1]["done"]) * seconds / steps if steps > 0 else None


def _row(job: Job, chosen: bool) -> str:
    state, title = job.standing.state, html.escape(job.title)
    mark = ' class="chosen"' if chosen else ""
    ended = time.strftime("%H:%M", time.localtime(job.standing.ended or job.standing.began or 0))
    return (
        f'<tr{mark} data-job="{job.id}"><td>{title}</td><td>{html.escape(job.kind)}</td>'
        f'<td><span class="state {state}">{state}</span></td>'
        f"<td>{'' if state == 'queued' else ended}</td></tr>"
    )


def _heading(job: Job) -> str:
    what = "The training of " if job.kind == "train" else ""
    name = f"<b>{html.escape(job.title)}</b>"
    return f"<p>{what}{name} {WORDS[job.standing.state]}.</p>"


def _bar(job: Job, reports: Sequence[dict[str, Any]]) -> str:
    last: dict[str, Any] = reports[-1] if reports else {"done": 0, "total": 0, "what": ""}
    done, total = last["done"], last["total"] or 1
    share = 1.0 if job.standing.state == "done" else min(1.0, done / total)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{round(100 * share)}" '
        f'aria-valuemin="0" aria-valuemax="100"><i style="width:{100 * share:.1f}%"></i></div>'
        f'<p class="numbers"><span>{_numbers(job, last)}</span>'
        f"<span>{_left(job, reports)}</span></p>"
    )


def _numbers(job: Job, last: dict[str, Any]) -> str:
    if last["total"]:
        return f"{html.escape(last['what'])} {last['done']} of {last['total']}"
    return "getting ready" if job.standing.state == "running" else "&nbsp;"


def _left(job: Job, reports: Sequence[dict[str, Any]]) -> str:
    if job.standing.state == "running":
        left = remaining(reports)
        return "" if left is None else f"about {_duration(left)} left"
    if job.standing.began and job.standing.ended:
        return f"took {_duration(job.standing.ended - job.standing.began)}"
    return ""


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _smoothed(values: Sequence[float]) -> list[float]:
    """Running means over the last tenth."""
    window = max(1, len(values) // 10)
    return [
        sum(values[max(0, k - window + 1) : k + 1]) / (k + 1 - max(0, k - window + 1))
        for k in range(len(values))
    ]


def _polyline(values: Sequence[float], low: float, extent: float) -> str:
    if len(values) < 2:
        return ""
    across, up = (WIDTH - 2 * MARGIN) / (len(values) - 1), HEIGHT - 2 * MARGIN
    points = " ".join(
        f"{MARGIN + k * across:.1f},{MARGIN + up * (1 - (value - low) / extent):.1f}"
        for k, value in enumerate(values)
    )
    return f'<polyline points="{points}"/>'
