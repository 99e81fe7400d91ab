"""The tab Export: concepts for other tools, and files of others into the library."""

import html
from pathlib import Path

import gradio as gr

from sbora_diffusion.app.chooser import Chooser
from sbora_diffusion.app.desk import PRIVATE, Desk, empty_after, in_plain_words
from sbora_diffusion.app.found import result, same
from sbora_diffusion.app.importing import bring
from sbora_diffusion.app.job_panel import JobPanel
from sbora_diffusion.app.merging import TOOLS, submit_export

NOTHING = "Choose concepts and the tool that shall read them. The result appears here."
Selection = dict[str, float] | None


class ExportTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk
        self.panel = JobPanel(desk, ("export",), "export", result, pictures=None)

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=6, min_width=300):
                gr.Markdown("### Which concepts")
                chooser = Chooser(self.desk, "export")
                chooser.look_at(tab.select)
                selection = chooser.selection
                to = gr.Radio(list(TOOLS), value=next(iter(TOOLS)), label="For")
                name = gr.Textbox(
                    label="Name", placeholder="made from the concepts' names", max_length=64
                )
                export = gr.Button("Export", variant="primary", elem_id="export")
                with gr.Accordion("Bring in a concept file", open=False):
                    upload = gr.File(
                        label="A .safetensors file that `sbora train` wrote", height=150,
                        file_types=[".safetensors"], elem_id="import",
                    )  # fmt: skip
                    brought = gr.HTML("", elem_id="brought")
            with gr.Column(scale=6, min_width=300):
                self.panel.build(page, NOTHING)
        export.click(self.export, [selection, to, name], self.panel.outputs, **PRIVATE)
        empty_after(upload.upload(self.bring, upload, brought, **PRIVATE), upload)

    def export(self, selection: Selection, to: str, name: str, request: gr.Request) -> list:
        """Put the export into the queue."""
        with in_plain_words():
            job = submit_export(
                self.desk.workspace(request), self.desk.store(request), selection or {},
                TOOLS[to], name,
            )  # fmt: skip
        return self.panel.point_to(job.id, request)

    def bring(self, upload: str | None, request: gr.Request) -> str:
        """Register the concepts of a file."""
        workspace, file = self.desk.workspace(request), Path(upload or "")
        with in_plain_words():
            names = bring(workspace, self.desk.engine, file)
        words = ["library", "add", file.name, "--library", str(workspace.library.path)]
        told = f'<p class="good">{html.escape(", ".join(names))} can be used now.</p>'
        return told + same(words)
