"""The tab Generate: prompt, concepts with weights, regions, pictures."""

import asyncio
import contextvars
import html
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.app.bases import FOLDER, POCKET, choose_base, found_bases
from sbora_diffusion.app.chooser import Chooser, Selection
from sbora_diffusion.app.desk import PRIVATE, Desk, empty_after, in_plain_words
from sbora_diffusion.app.drawing import (
    AUTO,
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_REGIONS,
    MAX_SEED,
    MAX_STEPS,
    Outcome,
    Request,
    Studio,
    restored,
)
from sbora_diffusion.app.shown import shown_path
from sbora_diffusion.core.errors import DataError
from sbora_diffusion.pictures import read_parameters

SIDE_BY_SIDE_JS = """(selection, regions) => {
  const names = Object.keys(selection || {});
  const x = (k) => Math.round(100 * k / names.length) / 100;
  return names.map((name, k) => `${name}=${x(k)},0,${x(k + 1)},1`).join("\\n");
}"""

LINGERING = 10
"""Seconds in which a closed page may still have something begin."""


class GenerateTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self._works: dict[str | None, set[asyncio.Future]] = {}

    def first(self, request: gr.Request) -> tuple[str, Selection, str]:
        """What a fresh page shows: a prompt that works, its concepts, and a stamp of the rows."""
        cards = self.desk.workspace(request).cards()[0][:2]
        tokens = [card.token for card in cards if card.token] or ["a dog"]
        chosen = {card.key: 1.0 for card in cards}
        prompt = f"a photo of {' next to '.join(tokens)} on the beach"
        return prompt, chosen, self.chooser.anew(request)

    async def generate(
        self,
        prompt: str,
        selection: Selection | None,
        seed: int,
        num: int,
        steps: int,
        guidance: float,
        negative_prompt: str,
        regions: str,
        size: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
    ) -> tuple[list[tuple[str, str]], str, str]:
        """Draw pictures; returns (picture, caption) pairs, the parameters, and the command."""
        wanted = _request(
            prompt, selection, seed, num, steps, guidance, negative_prompt, regions, size
        )
        (outcome,) = await self._draw([wanted], request, progress)
        for warning in outcome.warnings:
            gr.Warning(warning)
        captions = [f"seed {seed}" for seed in outcome.seeds]
        pictures = [(str(f), c) for f, c in zip(outcome.files, captions, strict=True)]
        return pictures, _used(wanted, outcome.seeds), outcome.command

    async def compare(
        self,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
        *inputs: Any,
    ) -> tuple[str, str]:
        """One picture as the base alone draws it, and with the concepts; `inputs` are those of
        `generate`."""
        wanted = _request(*inputs)
        wanted = replace(wanted, seed=max(wanted.seed, 0), num=1)
        bare = self.desk.studio(request).bare(wanted)
        before, after = await self._draw([bare, wanted], request, progress)
        return str(before.files[0]), str(after.files[0])

    async def _draw(
        self, wanted: list[Request], request: gr.Request, progress: gr.Progress
    ) -> list[Outcome]:
        """Each of them, when it is this page's turn; ends early when the page is closed."""
        work = asyncio.ensure_future(self._in_turn(wanted, self.desk.studio(request), progress))
        mine = self._works.setdefault(request.session_hash, set())
        mine.add(work)
        try:
            with in_plain_words():
                return await work
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            raise gr.Error("Stopped.", duration=3, title="", print_exception=False) from None
        finally:
            mine.discard(work)
            if not mine:
                self._works.pop(request.session_hash, None)

    async def _in_turn(
        self, wanted: list[Request], studio: Studio, progress: gr.Progress
    ) -> list[Outcome]:
        stop, context = threading.Event(), contextvars.copy_context()

        def tell(place: int) -> None:
            words = f"{place} before you" if place else "Getting the base ready"
            context.run(progress, 0, desc=words)

        def on_step(done: int, total: int) -> None:
            progress((done, total), desc="Drawing")

        try:
            async with self.desk.gate.turn(tell):
                return [
                    await self.desk.engine.run(studio.draw, one, on_step, stop) for one in wanted
                ]
        finally:
            stop.set()  # what draws on for nobody ends at its next step

    async def stop(self, request: gr.Request) -> None:
        """End this session's drawings, those that wait and the one that is under way."""
        for work in self._works.get(request.session_hash, set()).copy():
            work.cancel()

    async def leave(self, request: gr.Request) -> None:
        """The page is closed: nobody waits for its drawings, nor for one that a busy server is only
        about to begin."""
        for _ in range(LINGERING):
            await self.stop(request)
            await asyncio.sleep(1)

    def restore(self, file: str | None, request: gr.Request) -> list[Any]:
        """Everything that made a picture, read from it; the inputs, and the rows anew."""
        if not file:
            return [gr.skip()] * 10
        with in_plain_words():
            parameters = read_parameters(Path(file))
            if not parameters:
                raise DataError(
                    f"{Path(file).name} says nothing about how it was drawn",
                    "take a PNG that was drawn here or by `sbora generate`",
                )
            cards = self.desk.workspace(request).cards()[0]
            found, missing = restored(parameters, cards)
        for name in missing:
            gr.Warning(f"The picture was drawn with {name}, which is not known here.")
        chosen = dict(found.concepts)
        return [
            found.prompt, chosen, found.seed, found.num, found.steps, found.guidance,
            found.negative_prompt, found.regions,
            found.size or self.desk.workspace(request).base.sizes[0], self.chooser.anew(request),
        ]  # fmt: skip

    def bases(self, request: gr.Request) -> tuple[Any, Any]:
        """What can be chosen, what is chosen, and the sizes of its pictures."""
        base = self.desk.workspace(request).base
        names = list(found_bases(self.desk.workspaces.home))
        return (
            gr.Dropdown(choices=names, value=base.name),
            gr.Dropdown(choices=base.sizes, value=base.sizes[0]),
        )

    def change_base(self, name: str, request: gr.Request) -> tuple[Any, Any, Selection, str]:
        """Load another base; its concepts take the place of those of the one before."""
        with in_plain_words():
            folder = self.desk.workspace(request).folder
            choose_base(folder, self.desk.workspaces.home, name, self.desk.engine)
        return *self.bases(request), {}, self.chooser.anew(request)

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=6, min_width=300):
                prompt = gr.Textbox(
                    label="Prompt", lines=2, max_length=MAX_PROMPT, interactive=True,
                    placeholder="a photo of … on the beach", elem_id="prompt",
                    info="Shift + Enter draws. A concept is called by its <token>.",
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
                    halt = gr.Button("Stop", variant="stop", scale=1, min_width=80)
                gr.Markdown("### Concepts")
                self.chooser = Chooser(self.desk, "use", prompt)
                selection, rows = self.chooser.selection, self.chooser.stamp
                regions = self._regions(selection)
                settings, size = self._settings()
                inputs = [prompt, selection, *settings, regions, size]
            with gr.Column(scale=5, min_width=300):
                outputs = self._results()
                with gr.Accordion("Compare with the base alone", open=False):
                    compare = gr.Button("Draw both", elem_id="compare")
                    slider = gr.ImageSlider(
                        label="Base alone, and with the concepts", interactive=False, height=320,
                        elem_id="comparison",
                    )  # fmt: skip
                with gr.Accordion("Take the settings of a picture", open=False):
                    drop = gr.File(
                        label="A PNG that was drawn here", file_types=[".png"], height=150,
                        elem_id="restore",
                    )  # fmt: skip
        drawing = gr.on(
            [go.click, prompt.submit], self.generate, inputs, outputs, api_name="generate",
            show_progress_on=outputs[0], concurrency_limit=None,
        )  # fmt: skip
        comparing = compare.click(self.compare, inputs, slider, **PRIVATE)
        halt.click(self.stop, cancels=[drawing, comparing], queue=False, api_name="stop")
        taken = drop.upload(self.restore, drop, [*inputs, rows], **PRIVATE)
        empty_after(taken, drop)
        page.load(self.first, None, [prompt, selection, rows], **PRIVATE)
        page.load(self.bases, None, [self.base, size], show_progress="hidden", **PRIVATE)
        self.base.input(self.change_base, self.base, [self.base, size, selection, rows], **PRIVATE)
        self.chooser.look_at(tab.select)
        page.unload(self.leave)

    def _regions(self, selection: gr.JSON) -> gr.Textbox:
        with gr.Accordion("Regions: where each concept may be", open=False, elem_id="places"):
            with gr.Row():
                split = gr.Button("Side by side", size="sm", min_width=90)
                auto = gr.Button("Automatic", size="sm", min_width=90)
                clear = gr.Button("None", size="sm", min_width=70)
            gr.HTML('<div id="region-canvas"></div>')
            regions = gr.Textbox(
                label="In numbers", info="NAME = left, top, right, bottom, each from 0 to 1",
                lines=2, max_lines=6, max_length=MAX_REGIONS, elem_id="regions", interactive=True,
            )  # fmt: skip
        split.click(None, [selection, regions], regions, js=SIDE_BY_SIDE_JS, queue=False)
        auto.click(None, None, regions, js=f'() => "{AUTO}"', queue=False)
        clear.click(None, None, regions, js='() => ""', queue=False)
        return regions

    def _settings(self) -> tuple[list[gr.components.Component], gr.Dropdown]:
        with gr.Row():
            seed = gr.Number(
                42, label="Seed", info="-1: any", precision=0, minimum=-1,
                maximum=MAX_SEED, min_width=120, elem_id="seed",
            )  # fmt: skip
            num = gr.Slider(1, MAX_IMAGES, 1, step=1, label="Images", min_width=160, elem_id="num")
            size = gr.Dropdown(
                POCKET.sizes, value=POCKET.sizes[0], label="Size", allow_custom_value=True,
                info="width × height, in pixels", min_width=150, elem_id="size", interactive=True,
            )  # fmt: skip
        with gr.Accordion("Advanced", open=False):
            steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Sampling steps")
            guidance = gr.Slider(1, 15, DEFAULT_GUIDANCE, step=0.5, label="Guidance scale")
            negative = gr.Textbox(
                label="Negative prompt", max_length=MAX_PROMPT, placeholder="what to avoid"
            )
            folder = shown_path(self.desk.workspaces.home / FOLDER)
            self.base = gr.Dropdown(
                [POCKET.name], value=POCKET.name, label="Base model", interactive=True,
                elem_id="base", info="For all tabs. Model folders and .safetensors checkpoints in "
                f"{folder} can be chosen here after a reload.",
            )  # fmt: skip
        return [seed, num, steps, guidance, negative], size

    def _results(self) -> list[gr.components.Component]:
        gallery = gr.Gallery(
            label="Pictures", show_label=False, columns=2, height=420,
            object_fit="contain", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_id="gallery",
        )  # fmt: skip
        used = gr.Markdown("*Your pictures appear here.*", elem_id="used")
        command = gr.Textbox(
            label="The same on the command line", interactive=False, buttons=["copy"], lines=2,
            max_lines=8, elem_id="command", elem_classes="command",
        )  # fmt: skip
        return [gallery, used, command]


def _request(
    prompt: str,
    selection: Selection | None,
    seed: int,
    num: int,
    steps: int,
    guidance: float,
    negative_prompt: str | None,
    regions: str | None,
    size: str | None,
) -> Request:
    """The inputs as they come from the page, where what is empty may be None."""
    chosen, negative = dict(selection or {}), negative_prompt or ""
    return Request(
        prompt, chosen, seed, num, steps, guidance, negative, regions or "", size or ""
    )  # fmt: skip


def _used(request: Request, seeds: list[int]) -> str:
    """The parameters in one line for people."""
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    concepts = ", ".join(f"{k} × {w:g}" for k, w in sorted(request.concepts.items())) or "none"
    line = (
        f"**Seed** {several} · **steps** {request.steps} · **guidance** {request.guidance:g} · "
        f"**concepts** {html.escape(concepts)}"
    )
    if request.size:
        line += f" · **size** {html.escape(request.size)}"
    if request.negative_prompt:
        line += f" · **negative prompt** {html.escape(request.negative_prompt)}"
    if request.places:
        line += f" · **regions** {html.escape('; '.join(request.places))}"
    return line
