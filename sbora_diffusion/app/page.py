"""The page: a header and the tabs."""

import gradio as gr

from sbora_diffusion.app.desk import Desk
from sbora_diffusion.app.tab_concepts import ConceptsTab
from sbora_diffusion.app.tab_evaluate import EvaluateTab
from sbora_diffusion.app.tab_export import ExportTab
from sbora_diffusion.app.tab_generate import GenerateTab
from sbora_diffusion.app.tab_merge import MergeTab
from sbora_diffusion.app.tab_train import TrainTab

TITLE = "SBoRA Diffusion"
QUEUE_SIZE = 256
"""Requests that wait for the server; drawings have a smaller bound of their own."""
HEADER = f"""<header id="top"><h1>{TITLE}</h1>
<p>Put subjects learned from a few pictures together in one new picture.</p>
<button id="scheme" type="button" aria-label="switch between light and dark">Light / dark</button>
</header>"""
DAY = 86_400


def build(desk: Desk) -> gr.Blocks:
    """All tabs around one desk."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, DAY)) as page:
        gr.HTML(HEADER)
        with gr.Tabs():
            for name, tab in _tabs(desk).items():
                with gr.Tab(name, id=name.lower()) as place:
                    tab.build(page, place)
    page.queue(default_concurrency_limit=4, max_size=QUEUE_SIZE)
    return page


def _tabs(desk: Desk) -> dict:
    return {
        "Generate": GenerateTab(desk),
        "Concepts": ConceptsTab(desk),
        "Train": TrainTab(desk),
        "Merge": MergeTab(desk),
        "Evaluate": EvaluateTab(desk),
        "Export": ExportTab(desk),
    }
