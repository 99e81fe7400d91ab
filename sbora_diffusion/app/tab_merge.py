"""The tab Merge: may they live together, what would change, and one model of several."""

import gradio as gr

from sbora_diffusion.app.chooser import Chooser
from sbora_diffusion.app.desk import PRIVATE, Desk, in_plain_words
from sbora_diffusion.app.found import result, same, verdict
from sbora_diffusion.app.job_panel import JobPanel
from sbora_diffusion.app.merging import (
    FORMS,
    check_words,
    judge,
    product_pictures,
    submit_check,
    submit_merge,
)

NOTHING = "Choose two concepts or more. What is found and made appears here."
Selection = dict[str, float] | None


class MergeTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.panel = JobPanel(desk, ("merge", "check"), "merge", result, product_pictures)

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=6, min_width=300):
                gr.Markdown("### Which concepts")
                chooser = Chooser(self.desk, "merge")
                chooser.look_at(tab.select)
                selection = chooser.selection
                with gr.Row():
                    check = gr.Button("Check", elem_id="check", min_width=120)
                    predict = gr.Button("Predict crosstalk", elem_id="predict", min_width=120)
                said = gr.HTML(
                    '<p class="empty">Check says whether they can live in one model.</p>',
                    elem_id="verdict", elem_classes="detail",
                )  # fmt: skip
                form = gr.Radio(list(FORMS), value=next(iter(FORMS)), label="Write as")
                calibrate = gr.Checkbox(
                    True, label="Calibrate a model",
                    info="each concept then acts on its own prompts alone; takes half a minute",
                )  # fmt: skip
                name = gr.Textbox(
                    label="Name", placeholder="made from the concepts' names", max_length=64,
                    elem_id="merge-name",
                )  # fmt: skip
                merge = gr.Button("Merge", variant="primary", elem_id="merge")
            with gr.Column(scale=6, min_width=300):
                self.panel.build(page, NOTHING)
        check.click(self.check, selection, said, **PRIVATE)
        predict.click(self.predict, selection, self.panel.outputs, **PRIVATE)
        merge.click(self.merge, [selection, form, calibrate, name], self.panel.outputs, **PRIVATE)

    def check(self, selection: Selection, request: gr.Request) -> str:
        """All that can be known at once."""
        with in_plain_words():
            workspace, chosen = self.desk.workspace(request), selection or {}
            return verdict(judge(workspace, chosen)) + same(check_words(workspace, chosen))

    def predict(self, selection: Selection, request: gr.Request) -> list:
        """Put the check into the queue that draws with each concept."""
        with in_plain_words():
            job = submit_check(
                self.desk.workspace(request), self.desk.store(request), selection or {}
            )
        return self.panel.point_to(job.id, request)

    def merge(
        self, selection: Selection, form: str, calibrate: bool, name: str, request: gr.Request
    ) -> list:
        """Put the merge into the queue."""
        with in_plain_words():
            job = submit_merge(
                self.desk.workspace(request), self.desk.store(request), selection or {},
                FORMS[form], calibrate, name,
            )  # fmt: skip
        return self.panel.point_to(job.id, request)
