"""One concept as a row of the page."""

import base64
import functools
import html
import io
import json
from pathlib import Path

import gradio as gr

from sbora_diffusion.app.drawing import MAX_WEIGHT
from sbora_diffusion.cards import Card
from sbora_diffusion.core.errors import DataError

ROW_CSS = """
.concept {display: grid !important; align-items: center; gap: 4px 10px !important;
  padding: 2px 8px !important; grid-template-columns: 24px minmax(0, 1fr) max-content 172px}
.concept.plain {grid-template-columns: 24px minmax(0, 1fr) 180px}
.concept .html-container {padding: 0 !important}
.concept .reset-button {display: none}
.concept .card b {overflow-wrap: anywhere}
.concept > * {min-width: 0 !important; width: auto !important}
.concept .card {display: flex; align-items: center; gap: 10px}
.concept .card img, .concept .card .none {width: 46px; height: 46px; border-radius: 8px;
  object-fit: cover; flex: none}
.concept .card .none {display: grid; place-items: center; font-weight: 600;
  background: var(--neutral-200); color: var(--neutral-700)}
.concept .card small {display: block; color: var(--body-text-color-subdued)}
.concept .token {font-family: var(--font-mono); font-weight: 400}
.concept .switch {background: none !important; border: none !important; padding: 0 !important;
  box-shadow: none !important}
.concept .switch input {border-color: var(--neutral-400) !important; width: 20px; height: 20px}
.concept .switch span {position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%)}
@media (max-width: 600px) {
  .concept {grid-template-columns: 24px minmax(0, 1fr) max-content}
  .concept.plain {grid-template-columns: 24px minmax(0, 1fr)}
  .concept > :last-child {grid-column: 2 / -1}
  .concept .card img, .concept .card .none {width: 40px; height: 40px}
  .concept .card b {font-size: .85em}
  .concept .token {font-size: .7em}
}
"""
# A change of a row goes into the selection in the browser, so it cannot arrive after Generate.
SELECT_JS = """(on, weight, selection) => {{
  const next = {{...(selection || {{}})}};
  if (on) next[{key}] = weight; else delete next[{key}];
  return next;
}}"""
INSERT_JS = """(prompt) => [
  (prompt || "").toLowerCase().includes({token})
    ? prompt : ((prompt || "").trimEnd() + " " + {token}).trim(),
  true]"""


def concept_row(
    card: Card,
    weight: float | None,
    selection: gr.JSON,
    prompt: gr.Textbox | None = None,
    verb: str = "use",
) -> None:
    """Switch, picture and name, token, and weight of one concept.

    The row writes into `selection` (key → weight), the token's button into `prompt`.

    Args:
        weight: at first; None: the concept is off.
        verb: what the switch does with the concept.
    """
    on, name = weight is not None, json.dumps(card.key)
    with gr.Row(elem_classes="concept" if prompt is not None else ["concept", "plain"]):
        # Said, since gradio takes what an event writes into for an output and locks it.
        switch = gr.Checkbox(
            on, label=f"{verb} {card.name}", container=False, elem_classes="switch", min_width=24,
            interactive=True,
        )  # fmt: skip
        gr.HTML(_card_html(card, "" if prompt is not None else card.token), min_width=130)
        if prompt is not None:
            token = gr.Button(
                card.token or "–", size="sm", min_width=60, elem_classes="token",
            )  # fmt: skip
        slider = gr.Slider(
            0, MAX_WEIGHT, 1.0 if weight is None else weight, step=0.05,
            label=f"weight of {card.name}", show_label=False, container=False, min_width=150,
            interactive=True,
        )  # fmt: skip
    for part in (switch, slider):
        part.change(
            None, [switch, slider, selection], selection, js=SELECT_JS.format(key=name), queue=False
        )
    if prompt is not None:
        insert = INSERT_JS.format(token=json.dumps(card.token))
        token.click(None, [prompt], [prompt, switch], js=insert, queue=False)


def _card_html(card: Card, token: str) -> str:
    picture = f'<span class="none">{card.name[0].upper()}</span>'
    if card.thumbnail and (data := thumbnail(card.thumbnail)):
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="reference of {card.name}">'
    name, about = card.name, " · ".join(part for part in (card.class_noun, token) if part)
    words = f"<b>{html.escape(name)}</b><small>{html.escape(about)}</small>"
    return f'<div class="card">{picture}<div>{words}</div></div>'


@functools.lru_cache(maxsize=256)
def thumbnail(path: Path) -> str:
    """A small JPEG in base64, "" if the file is no picture."""
    from sbora_diffusion.diffusion.dataset import open_image  # torch, which the page does without

    try:
        image = open_image(path)
    except DataError:
        return ""
    image.thumbnail((128, 128))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
