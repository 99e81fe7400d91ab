"""The tab Evaluate: how well a concept was learned, and what the project measured."""

from typing import Any

import gradio as gr

from sbora_diffusion.app.desk import PRIVATE, Desk, in_plain_words
from sbora_diffusion.app.found import RECORDS, result, study
from sbora_diffusion.app.job_panel import JobPanel
from sbora_diffusion.app.merging import product_pictures, submit_evaluation

NOTHING = "Alignment with the prompts and with your pictures, and all that was judged, appear here."
HOW = (
    "Ten prompts are drawn with the concept, and with its bare class word by the base alone. "
    "*Text alignment* says how well a picture follows its prompt, *image alignment* how much it "
    "resembles the pictures that the concept was learned from."
)
SHEET = RECORDS.parent / "docs" / "merging_quality.jpg"


class EvaluateTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.panel = JobPanel(desk, ("evaluate",), "evaluate", result, product_pictures)

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                gr.Markdown(HOW)
                concept = gr.Dropdown([], label="Concept", interactive=True, elem_id="judged")
                weight = gr.Slider(0, 1.5, 1.0, step=0.05, label="Weight")
                num = gr.Slider(1, 4, 1, step=1, label="Pictures of each prompt")
                steps = gr.Slider(2, 50, 20, step=1, label="Sampling steps", elem_id="judge-steps")
                go = gr.Button("Evaluate", variant="primary", elem_id="evaluate")
            with gr.Column(scale=6, min_width=300):
                self.panel.build(page, NOTHING)
        if measured := study():
            with gr.Accordion("Fourteen concepts alone and merged, as measured", open=False):
                gr.HTML(measured)
                gr.Markdown(
                    "Text and image alignment; the record is `results/merging_quality.json`."
                )
                if SHEET.is_file():
                    gr.Image(
                        str(SHEET), show_label=False, interactive=False, buttons=["fullscreen"]
                    )
        go.click(self.evaluate, [concept, weight, num, steps], self.panel.outputs, **PRIVATE)
        for refresh in (page.load, tab.select):
            refresh(self.concepts, concept, concept, show_progress="hidden", **PRIVATE)

    def concepts(self, chosen: str | None, request: gr.Request) -> Any:
        """What can be judged."""
        keys = [card.key for card in self.desk.workspace(request).cards()[0]]
        kept = chosen if chosen in keys else next(iter(keys), None)
        return gr.Dropdown(choices=keys, value=kept)

    def evaluate(
        self, concept: str | None, weight: float, num: int, steps: int, request: gr.Request
    ) -> list[Any]:
        """Put the evaluation into the queue."""
        with in_plain_words():
            job = submit_evaluation(
                self.desk.workspace(request), self.desk.store(request), concept or "", weight, num,
                steps,
            )  # fmt: skip
        return self.panel.point_to(job.id, request)
