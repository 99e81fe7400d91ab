"""Jobs on a tab: what runs and waits, one of them in full, stop and go on, what it made."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.app.desk import PRIVATE, Desk, in_plain_words
from sbora_diffusion.app.job_store import Job
from sbora_diffusion.app.job_view import job_detail, job_list, samples
from sbora_diffusion.core.errors import ConfigError

EVERY_SECONDS = 1.5
View = Callable[[Job], str]
Pictures = Callable[[Job | None], Sequence[tuple[Path, str]]]


class JobPanel:
    """Shows the jobs of some kinds and follows them.

    Args:
        kinds: of the jobs.
        result: what an ended job found, as HTML.
        pictures: what a job has drawn so far; None where jobs draw nothing.
    """

    def __init__(
        self,
        desk: Desk,
        kinds: tuple[str, ...],
        name: str,
        result: View = lambda _: "",
        pictures: Pictures | None = samples,
    ):
        self.desk, self.kinds, self.name = desk, kinds, name
        self.result, self.pictures = result, pictures

    def build(self, page: gr.Blocks, empty: str) -> None:
        """The layout; `outputs` are then what `show` returns."""
        self.chosen = gr.Dropdown([], label="Job", interactive=True, elem_id=f"{self.name}-job")
        self.detail = gr.HTML(
            job_detail(None, empty), elem_classes=f"detail {self.name}", elem_id=f"{self.name}-view"
        )
        with gr.Row():
            common: dict[str, Any] = {"size": "sm", "min_width": 80, "interactive": False}
            stop = gr.Button("Stop", variant="stop", **common)
            resume = gr.Button("Go on", elem_id=f"{self.name}-resume", **common)
            forget = gr.Button("Remove from the list", **common)
        self.gallery = gr.Gallery(
            visible=self.pictures is not None, show_label=False, columns=3, height=220,
            fit_columns=False,
            object_fit="contain", interactive=False,
            buttons=["download", "fullscreen"], elem_id=f"{self.name}-pictures", format="png",
        )  # fmt: skip
        with gr.Accordion("Command, and the file that was made", open=False):
            self.command = gr.Textbox(
                label="The same on the command line", interactive=False, buttons=["copy"],
                lines=2, max_lines=8, elem_classes="command", elem_id=f"{self.name}-command",
            )  # fmt: skip
            fetch = gr.Button("Fetch the file", size="sm", elem_id=f"{self.name}-fetch")
            fetched = gr.File(
                label="A folder comes as one archive", interactive=False, height=90,
                elem_id=f"{self.name}-file",
            )  # fmt: skip
        self.table = gr.HTML(job_list([], None), elem_id=f"{self.name}-jobs")
        self.shown = gr.State("")
        self.clock = gr.Timer(EVERY_SECONDS, active=False)
        self.empty = empty
        self.outputs: list[Any] = [
            self.chosen, self.detail, self.table, self.gallery, self.command, self.shown,
            self.clock, stop, resume, forget,
        ]  # fmt: skip
        inputs = [self.chosen, self.shown]
        quiet = {"show_progress": "hidden", **PRIVATE}
        self.clock.tick(self.show, inputs, self.outputs, queue=False, **quiet)
        self.chosen.input(self.show, inputs, self.outputs, **quiet)
        page.load(self.newest, None, self.outputs, **quiet)
        stop.click(self.stop, inputs, self.outputs, **quiet)
        resume.click(self.resume, inputs, self.outputs, **quiet)
        fetch.click(self.fetch, self.chosen, fetched, **PRIVATE)
        forget.click(self.forget, inputs, self.outputs, **quiet)

    def jobs(self, request: gr.Request) -> list[Job]:
        """Those of this panel, the newest first."""
        return [job for job in self.desk.store(request).jobs() if job.kind in self.kinds]

    def newest(self, request: gr.Request) -> list[Any]:
        """What a fresh page shows: the job that runs, or the last one."""
        jobs = self.jobs(request)
        running = [job for job in jobs if job.standing.state == "running"]
        return self.point_to(next((job.id for job in running + jobs), None), request)

    def point_to(self, chosen: str | None, request: gr.Request) -> list[Any]:
        """Values of `outputs` for another job than the one that was chosen."""
        jobs = self.jobs(request)
        return [
            gr.Dropdown(choices=_choices(jobs), value=chosen),
            *self._about(chosen, "", request),
        ]

    def show(self, chosen: str | None, shown: str, request: gr.Request) -> list[Any]:
        """Values of `outputs`; what has not changed is left alone, so that nothing jumps.

        What is chosen is left to the person: an answer that comes late must not take it back.
        """
        jobs = self.jobs(request)
        same = (shown or "\n").split("\n")[0] == _state(chosen, jobs)
        choices = gr.skip() if same else gr.Dropdown(choices=_choices(jobs))
        return [choices, *self._about(chosen, shown, request)]

    def _about(self, chosen: str | None, shown: str, request: gr.Request) -> list[Any]:
        jobs = self.jobs(request)
        job = next((job for job in jobs if job.id == chosen), None)
        pictures = self.pictures(job) if self.pictures else []
        state = _state(chosen, jobs)
        drawn = f"{state} {len(pictures)}"
        before = (shown or "\n").split("\n")
        same_list, same_pictures = before[0] == state, before[-1] == drawn
        return [
            job_detail(job, self.empty) + (self.result(job) if job else ""),
            gr.skip() if same_list else job_list(jobs, chosen),
            gr.skip() if same_pictures else self._handed(pictures),
            gr.skip() if same_list else (job.command if job else ""),
            f"{state}\n{drawn}",
            gr.Timer(active=any(job.is_open for job in jobs)),
            gr.skip() if same_list else gr.Button(interactive=bool(job and job.is_open)),
            gr.skip() if same_list else gr.Button(interactive=bool(job and job.can_resume)),
            gr.skip() if same_list else gr.Button(interactive=bool(job and not job.is_open)),
        ]

    def stop(self, chosen: str | None, shown: str, request: gr.Request) -> list[Any]:
        with in_plain_words():
            self.desk.store(request).stop(chosen or "")
        return self.show(chosen, shown, request)

    def resume(self, chosen: str | None, shown: str, request: gr.Request) -> list[Any]:
        with in_plain_words():
            self.desk.store(request).resume(chosen or "")
        return self.show(chosen, shown, request)

    def forget(self, chosen: str | None, shown: str, request: gr.Request) -> list[Any]:
        with in_plain_words():
            self.desk.store(request).forget(chosen or "")
        return self.newest(request)

    def fetch(self, chosen: str | None, request: gr.Request) -> str:
        """What a job made, for the browser."""
        with in_plain_words():
            job = self.desk.store(request).get(chosen or "")
            if job.standing.state != "done" or not Path(job.product).exists():
                raise ConfigError("There is no file yet", "wait until the job is done")
            return str(self.desk.handout.copy(Path(job.product)))

    def _handed(self, pictures: Sequence[tuple[Path, str]]) -> list[tuple[str, str]]:
        handed = [(self.desk.handout.copy(file), caption) for file, caption in pictures]
        return [(str(file), caption) for file, caption in handed]


def _state(chosen: str | None, jobs: Sequence[Job]) -> str:
    return f"{chosen} {[(job.id, job.standing.state) for job in jobs]}"


def _choices(jobs: Sequence[Job]) -> list[tuple[str, str]]:
    return [(f"{job.title} · {job.kind} · {job.standing.state}", job.id) for job in jobs]
