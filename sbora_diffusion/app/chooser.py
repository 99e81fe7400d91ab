"""A list of concepts with switches and weights."""

import html
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from sbora_diffusion.app.desk import ONE_BY_ONE, PRIVATE, Desk
from sbora_diffusion.app.rows import concept_row

NONE_YET = (
    "*No concepts yet.* Make one under **Concepts** and train it. Until then the base draws what "
    "it knows: try *a photo of a dog on the beach*."
)
Selection = dict[str, float]


class Chooser:
    """The list; it is made anew when other concepts are known, and keeps what was chosen.

    Attributes:
        selection: what is chosen in it: key → weight.
        stamp: when this changes, the rows are made anew from `selection`.
    """

    def __init__(self, desk: Desk, verb: str, prompt: gr.Textbox | None = None):
        self.desk, self.verb, self.prompt = desk, verb, prompt
        self.selection = gr.JSON({}, label="concepts", visible=False)
        self.stamp = gr.State("")

        @gr.render(inputs=self.selection, triggers=[self.stamp.change], **ONE_BY_ONE)
        def rows(chosen: Selection | None, request: gr.Request) -> None:
            cards, problems = desk.workspace(request).cards()
            if not cards:
                gr.Markdown(NONE_YET)
            for card in cards:
                weight = (chosen or {}).get(card.key)
                concept_row(card, weight, self.selection, prompt, verb)
            for problem in problems:
                gr.Markdown(f"⚠️ {html.escape(problem)}")

    def look_at(self, *events: Callable[..., Any]) -> None:
        """Look for other concepts at each of these events."""
        for event in events:
            event(self.look, self.stamp, self.stamp, show_progress="hidden", **PRIVATE)

    def known(self, request: gr.Request) -> str:
        """The concepts that there are."""
        cards = self.desk.workspace(request).cards()[0]
        return repr([(card.key, card.token, str(card.path)) for card in cards])

    def look(self, stamp: str, request: gr.Request) -> Any:
        """Another stamp where other concepts are known; the prompt's tab gets its first with it."""
        known = self.known(request)
        first = not stamp and self.prompt is not None
        return gr.skip() if first or stamp.startswith(known) else known

    def anew(self, request: gr.Request) -> str:
        """A stamp that no other is equal to."""
        return f"{self.known(request)} {time.monotonic()}"
