"""The page of the app: `python app.py` or `sbora app`."""

import html
import ipaddress
import logging
import os
import threading
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while gradio is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the pocket base needs no hub

import gradio as gr

from sbora_diffusion.cards import Card
from sbora_diffusion.core.errors import ConfigError, ResourceError, SboraError
from sbora_diffusion.studio import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    EXAMPLES,
    MAX_IMAGES,
    MAX_PROMPT,
    MAX_SEED,
    MAX_STEPS,
    Request,
    Stopped,
    Studio,
)
from sbora_diffusion.webui_rows import ROW_CSS, concept_row

logger = logging.getLogger(__name__)

TITLE = "SBoRA Diffusion"
NO_CONCEPTS = (
    "*No concepts yet.* Train one from a few pictures with `sbora train FOLDER`, then reload this "
    "page. Until then the base draws what it knows: try *a photo of a dog on the beach*."
)
QUEUE_SIZE = 16
CSS = (
    """
.gradio-container {max-width: 1180px !important; width: 100% !important; margin: 0 auto !important}
#gallery {min-height: 260px}
#command textarea {font-family: var(--font-mono); font-size: .85em}
"""
    + ROW_CSS
)


def theme() -> gr.themes.Base:
    """One accent, fonts of the system only: nothing is fetched."""
    return gr.themes.Soft(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "DejaVu Sans Mono", "monospace"],
    )


class Page:
    """Handlers of the page's events around one `Studio`."""

    def __init__(self, studio: Studio):
        self.studio = studio
        self._stops: dict[str | None, threading.Event] = {}

    def first(self) -> tuple[str, dict[str, float]]:
        """What a fresh page shows: a prompt that works, and key → weight of its concepts."""
        cards = self._first()
        tokens = [card.token for card in cards if card.token] or ["a dog"]
        return f"a photo of {' next to '.join(tokens)} on the beach", {c.key: 1.0 for c in cards}

    def generate(
        self,
        prompt: str,
        selection: dict[str, float] | None,
        seed: int,
        num: int,
        steps: int,
        guidance: float,
        negative_prompt: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - how gradio hands it over
    ) -> tuple[list[tuple[str, str]], str, str]:
        """Draw pictures; returns (picture, caption) pairs, the parameters, and the command."""
        stop = self._stops[request.session_hash] = threading.Event()
        wanted = Request(
            prompt, dict(selection or {}), seed, num, steps, guidance, negative_prompt or ""
        )
        progress(0, desc="Getting the base ready")
        try:
            outcome = self.studio.draw(
                wanted, lambda done, total: progress((done, total), desc="Drawing"), stop
            )
        except Exception as error:
            raise _for_people(error) from error
        finally:
            self._stops.pop(request.session_hash, None)
        for warning in outcome.warnings:
            gr.Warning(warning)
        captions = [f"seed {seed}" for seed in outcome.seeds]
        pictures = [(str(f), c) for f, c in zip(outcome.files, captions, strict=True)]
        return pictures, _used(wanted, outcome.seeds), outcome.command

    def stop(self, request: gr.Request) -> None:
        """End this session's drawing at the next step."""
        if event := self._stops.get(request.session_hash):
            event.set()

    def warm_up(self) -> None:
        """Load the base while the person reads the page."""
        try:
            self.studio.load()
        except SboraError as error:
            gr.Warning(str(error))

    def _first(self) -> list[Card]:
        return self.studio.cards()[0][:2]

    def build(self) -> gr.Blocks:
        """The page."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.Markdown(
                f"# {TITLE}\nPut subjects learned from a few pictures together in one new picture."
            )
            with gr.Row():
                with gr.Column(scale=6, min_width=320):
                    prompt = gr.Textbox(
                        label="Prompt", lines=2, max_length=MAX_PROMPT,
                        placeholder="a photo of … on the beach", elem_id="prompt",
                        interactive=True,
                    )  # fmt: skip
                    selection = gr.JSON(label="concepts", visible=False)
                    self._shelf(prompt, selection)
                    inputs = [prompt, selection, *self._settings()]
                    with gr.Row():
                        go = gr.Button("Generate", variant="primary", scale=3, elem_id="generate")
                        halt = gr.Button("Stop", variant="stop", scale=1, min_width=80)
                with gr.Column(scale=5, min_width=320):
                    outputs = self._results()
            drawing = gr.on(
                [go.click, prompt.submit], self.generate, inputs, outputs, api_name="generate",
                show_progress_on=outputs[0],
            )  # fmt: skip
            halt.click(self.stop, cancels=[drawing], queue=False, api_name="stop")
            page.load(self.first, None, [prompt, selection], api_visibility="private")
            page.unload(self.stop)
            page.load(self.warm_up, show_progress="hidden", api_visibility="private")
        page.queue(default_concurrency_limit=1, max_size=QUEUE_SIZE)
        return page

    def _shelf(self, prompt: gr.Textbox, selection: gr.JSON) -> None:
        gr.Markdown("### Concepts")

        @gr.render()
        def shelf() -> None:
            cards, problems = self.studio.cards()
            if not cards:
                gr.Markdown(NO_CONCEPTS)
            on = {card.key for card in self._first()}
            for card in cards:
                concept_row(card, card.key in on, prompt, selection)
            for problem in problems:
                gr.Markdown(f"⚠️ {html.escape(problem)}")

    def _settings(self) -> list[gr.components.Component]:
        with gr.Row():
            seed = gr.Number(
                42, label="Seed", info="-1: another one each time", precision=0, minimum=-1,
                maximum=MAX_SEED, min_width=120,
            )  # fmt: skip
            num = gr.Slider(1, MAX_IMAGES, 2, step=1, label="Images", min_width=160)
        with gr.Accordion("Advanced", open=False):
            steps = gr.Slider(1, MAX_STEPS, DEFAULT_STEPS, step=1, label="Sampling steps")
            guidance = gr.Slider(1, 15, DEFAULT_GUIDANCE, step=0.5, label="Guidance scale")
            negative = gr.Textbox(
                label="Negative prompt", max_length=MAX_PROMPT, placeholder="what to avoid"
            )
        return [seed, num, steps, guidance, negative]

    def _results(self) -> list[gr.components.Component]:
        gallery = gr.Gallery(
            label="Pictures", show_label=False, columns=2, height="auto",
            object_fit="contain", format="png", interactive=False,
            buttons=["download", "fullscreen"], elem_id="gallery",
        )  # fmt: skip
        used = gr.Markdown("*Your pictures appear here.*", elem_id="used")
        command = gr.Textbox(
            label="The same on the command line", interactive=False, buttons=["copy"], lines=2,
            max_lines=8, elem_id="command",
        )  # fmt: skip
        return [gallery, used, command]


def main(
    listen: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    library: str | Path | None = None,
    open_browser: bool = False,
    block: bool = True,
    examples: Path = EXAMPLES,
) -> gr.Blocks:
    """Serve the page.

    Args:
        auth: ``name:password``, needed when `listen` is not this machine alone.
        library: the user's library file.
        block: wait until the server is stopped; otherwise it runs in a thread.
        examples: concept files that everybody sees.

    Raises:
        ConfigError: `listen` would let others in without a login, or `auth` is malformed.
        ResourceError: the port is in use.
    """
    login = _login(auth)
    if not login and not _is_loopback(listen):
        raise ConfigError(
            f"listening on {listen} lets others in without a login",
            "give --auth NAME:PASSWORD, or listen on 127.0.0.1",
        )
    page = Page(Studio(library, examples)).build()
    try:
        page.launch(
            server_name=listen, server_port=port, auth=login, share=False, inbrowser=open_browser,
            prevent_thread_lock=not block, theme=theme(), css=CSS, max_file_size="10mb",
            allowed_paths=[], show_error=False, ssr_mode=False, pwa=False, mcp_server=False,
            enable_monitoring=False, run_history=False, strict_cors=True, footer_links=[],
            state_session_capacity=200, quiet=not block,
        )  # fmt: skip
    except OSError as error:
        raise ResourceError(f"{listen}:{port} is in use", "choose another --port") from error
    return page


def _login(auth: str | None) -> tuple[str, str] | None:
    if not auth:
        return None
    name, _, password = auth.partition(":")
    if not name or not password:
        raise ConfigError("the login must be NAME:PASSWORD, both not empty", "e.g. ada:s3cret")
    return name, password


def _is_loopback(listen: str) -> bool:
    try:
        return listen == "localhost" or ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return False


def _used(request: Request, seeds: list[int]) -> str:
    """The parameters in one line for people."""
    several = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    concepts = ", ".join(f"{k} × {w:g}" for k, w in sorted(request.concepts.items())) or "none"
    line = (
        f"**Seed** {several} · **steps** {request.steps} · **guidance** {request.guidance:g} · "
        f"**concepts** {html.escape(concepts)}"
    )
    if request.negative_prompt:
        line += f" · **negative prompt** {html.escape(request.negative_prompt)}"
    return line


def _for_people(error: Exception) -> gr.Error:
    """A message for the page; faults of the program go to the log with their traceback."""
    if isinstance(error, SboraError):
        return gr.Error(str(error), duration=None, print_exception=False)
    if isinstance(error, Stopped):
        return gr.Error("Stopped.", duration=3, title="", print_exception=False)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = "Not enough memory for this; ask for fewer images."
        return gr.Error(text, duration=None, print_exception=False)
    logger.exception("the request failed")
    text = "Something went wrong in the program; its terminal says what."
    return gr.Error(text, duration=None, print_exception=False)
