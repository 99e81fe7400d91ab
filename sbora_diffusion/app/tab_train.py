"""The tab Train: a form from the schema, a queue of trainings, and how they go."""

from typing import Any

import gradio as gr

from sbora_diffusion.app.desk import PRIVATE, Desk, in_plain_words
from sbora_diffusion.app.job_panel import JobPanel
from sbora_diffusion.app.subjects import find_subjects
from sbora_diffusion.app.training_form import PRESETS, RECIPE, Field, form, submit_training

NOTHING = "A training's progress, loss and sample pictures appear here."


class TrainTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.panel = JobPanel(desk, ("train",), "train")
        self.fields = [field for fields in form().values() for field in fields]

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                subject = gr.Dropdown(
                    [], label="Concept", interactive=True, elem_id="subject",
                    info="Made under Concepts from your pictures.",
                )  # fmt: skip
                preset = gr.Radio(list(PRESETS), value=RECIPE, label="Preset")
                every = gr.Slider(
                    0, 400, 50, step=10, label="Steps between sample pictures", info="0: none"
                )
                start = gr.Button("Train", variant="primary", elem_id="train")
                gr.Markdown("#### Settings")
                widgets = self._form()
            with gr.Column(scale=6, min_width=300):
                self.panel.build(page, NOTHING)
        preset.input(self.apply, preset, widgets, **PRIVATE)
        start.click(self.start, [subject, every, *widgets], self.panel.outputs, **PRIVATE)
        for refresh in (page.load, tab.select):
            refresh(self.subjects, subject, subject, show_progress="hidden", **PRIVATE)

    def subjects(self, chosen: str | None, request: gr.Request) -> Any:
        """What can be trained."""
        names = list(find_subjects(self.desk.workspace(request)))
        return gr.Dropdown(choices=names, value=chosen if chosen in names else _last(names))

    def apply(self, preset: str) -> list[Any]:
        """The values of a preset, in the order of the widgets."""
        changes = PRESETS[preset]
        return [changes.get(field.name, field.default) for field in self.fields]

    def start(
        self, request: gr.Request, subject: str | None, every: int, *settings: Any
    ) -> list[Any]:
        """Put a training into the queue; `settings` come in the order of the widgets."""
        names = [field.name for field in self.fields]
        with in_plain_words():
            job = submit_training(
                self.desk.workspace(request), self.desk.store(request), subject or "",
                dict(zip(names, settings, strict=True)), every,
            )  # fmt: skip
        return self.panel.point_to(job.id, request)

    def _form(self) -> list[gr.components.Component]:
        widgets = []
        for heading, fields in form().items():
            with gr.Accordion(heading, open=False), gr.Row():
                widgets += [_widget(field) for field in fields]
        return widgets


def _last(names: list[str]) -> str | None:
    return names[-1] if names else None


def _widget(field: Field) -> gr.components.Component:
    common: dict[str, Any] = {
        "label": field.label, "info": field.info or None, "elem_id": f"set-{field.name}",
        "interactive": True, "min_width": 150,
    }  # fmt: skip
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.default, **common)
    if field.kind == "switch":
        return gr.Checkbox(field.default, **common)
    if field.optional:
        return gr.Textbox(placeholder="as usual", max_length=20, **common)
    return gr.Number(field.default, precision=0 if field.whole else None, **common)
