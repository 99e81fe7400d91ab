"""The tab Concepts: pictures become a concept folder; what is known, and who owns what."""

import html
import json
from pathlib import Path
from typing import Any

import gradio as gr

from sbora_diffusion.app.desk import ONE_BY_ONE, PRIVATE, Desk, in_plain_words
from sbora_diffusion.app.found import same
from sbora_diffusion.app.known_concepts import known_table, ownership
from sbora_diffusion.app.rows import thumbnail
from sbora_diffusion.app.subjects import (
    MAX_CAPTION,
    delete_subject,
    find_subjects,
    save_subject,
    usable,
)
from sbora_diffusion.diffusion.concepts import IMAGE_SUFFIXES

CAPTION_JS = "(text, captions) => ({{...(captions || {{}}), [{path}]: text}})"
STEPS = (
    "Three to ten pictures of one thing, from different sides and before different backgrounds, "
    "teach a concept."
)


class ConceptsTab:
    """Its handlers and its layout."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def build(self, page: gr.Blocks, tab: gr.Tab) -> None:
        """The layout, inside its tab."""
        with gr.Row():
            with gr.Column(scale=6, min_width=300):
                gr.Markdown(f"### A new concept\n{STEPS}")
                files = gr.File(
                    label="Pictures", file_count="multiple", height=150, elem_id="pictures",
                    file_types=sorted(IMAGE_SUFFIXES),
                )  # fmt: skip
                with gr.Accordion("Take a picture", open=False):
                    camera = gr.Image(
                        sources=["webcam"], type="filepath", label="Camera", elem_id="camera"
                    )
                captions = gr.JSON({}, visible=False)
                self._captions(files, captions)
                facts = self._facts()
                save = gr.Button("Save the concept", variant="primary", elem_id="save")
                saved = gr.HTML("", elem_id="saved")
            with gr.Column(scale=6, min_width=300):
                gr.Markdown("### Known here")
                table = gr.HTML(elem_id="known")
                with gr.Row():
                    victim = gr.Dropdown(
                        [], label="Delete", interactive=True, scale=3, min_width=160,
                        info="a folder of pictures, or a concept's place in the library",
                    )  # fmt: skip
                    delete = gr.Button("Delete", variant="stop", scale=1, min_width=90)
                gr.Markdown("### Who owns which columns and rows")
                room = gr.HTML(elem_id="room")
                owners = gr.Image(
                    label="Ownership", show_label=False, interactive=False, format="png",
                    height=300, buttons=["download", "fullscreen"], elem_id="owners",
                )  # fmt: skip
        overview = [table, victim, room, owners]
        files.upload(self.check, files, files, **PRIVATE)
        camera.change(self.photograph, [camera, files], [files, camera], **PRIVATE)
        save.click(
            self.save, [files, captions, *facts], [saved, files, captions, *facts, *overview],
            **PRIVATE,
        )  # fmt: skip
        delete.click(self.delete, victim, [saved, *overview], **PRIVATE)
        for refresh in (page.load, tab.select):
            refresh(self.overview, None, overview, show_progress="hidden", **PRIVATE)

    def check(self, files: list[str] | None) -> list[str] | None:
        """Keep the pictures among the uploads, and say what is wrong with the others."""
        good, problems = usable([Path(file) for file in files or []])
        for problem in problems:
            gr.Warning(html.escape(problem), duration=None)
        return [str(file) for file in good] or None

    def photograph(self, shot: str | None, files: list[str] | None) -> Any:
        """Add what the camera took, and make it ready for the next one."""
        return ([*(files or []), shot], None) if shot else gr.skip()

    def save(
        self,
        files: list[str] | None,
        captions: dict[str, str] | None,
        name: str,
        noun: str,
        token: str,
        category: str,
        licence: str,
        request: gr.Request,
    ) -> list[Any]:
        """Make the concept folder, and an empty form."""  # fmt: skip
        facts = {
            "name": name, "class_noun": noun, "token": token, "category": category,
            "licence": licence,
        }  # fmt: skip
        with in_plain_words():
            folder = save_subject(
                self.desk.workspace(request), facts, [Path(f) for f in files or []], captions or {}
            )
        note = f'<p class="good">{folder.name} is saved. Now train it under Train.</p>'
        return [note, None, {}, "", "", "", "object", "", *self.overview(request)]

    def delete(self, victim: str | None, request: gr.Request) -> list[Any]:
        """Delete a concept folder, or forget a concept of the library."""
        workspace, told = self.desk.workspace(request), '<p class="good">Deleted.</p>'
        with in_plain_words():
            kind, _, name = (victim or "folder:").partition(":")
            if kind == "folder":
                delete_subject(workspace, name)
            else:
                base, variant, own = json.loads(name)
                workspace.library.remove(own, base, variant)
                words = ["library", "remove", own, "--base", base, "--variant", variant]
                told += same([*words, "--library", str(workspace.library.path)])
        return [told, *self.overview(request)]

    def overview(self, request: gr.Request) -> list[Any]:
        """Table, what can be deleted, room left, and the map."""
        workspace = self.desk.workspace(request)
        with in_plain_words():
            subjects, entries = find_subjects(workspace), workspace.library.concepts()
            text, image = ownership(workspace.library)
            table = known_table(workspace)
        choices = [(f"{name}: the folder", f"folder:{name}") for name in subjects]
        choices += [
            (f"{e.name}: its slot {e.slot}", f"slot:{json.dumps([e.base, e.variant, e.name])}")
            for e in entries
        ]
        return [table, gr.Dropdown(choices=choices, value=None), text, image]

    def _facts(self) -> list[gr.components.Component]:
        with gr.Row():
            name = gr.Textbox(
                label="Name", placeholder="mug", max_length=64, min_width=140, elem_id="name",
                info="letters, digits, - and _",
            )  # fmt: skip
            noun = gr.Textbox(
                label="Class word", placeholder="mug", max_length=200, min_width=140,
                elem_id="noun", info="what it is, in the base's words",
            )  # fmt: skip
        with gr.Accordion("More about it", open=False):
            with gr.Row():
                token = gr.Textbox(
                    label="Token", placeholder="<mug>", max_length=64, min_width=140,
                    info="what prompts call it; <name> by default",
                )  # fmt: skip
                category = gr.Radio(["object", "character"], value="object", label="It is")
            licence = gr.Textbox(
                label="Licence of the pictures", placeholder="my own", max_length=200
            )
        return [name, noun, token, category, licence]

    def _captions(self, files: gr.File, captions: gr.JSON) -> None:
        @gr.render(inputs=files, triggers=[files.change], **ONE_BY_ONE)
        def rows(paths: list[str] | None) -> None:
            for number, path in enumerate(paths or [], 1):
                with gr.Row(elem_classes="picture", key=path):
                    gr.HTML(_picture(Path(path)), min_width=64)
                    caption = gr.Textbox(
                        label=f"What is on picture {number}?", max_length=MAX_CAPTION,
                        placeholder="optional: <token> on a table", key=f"caption {path}",
                        interactive=True,
                    )  # fmt: skip
                js = CAPTION_JS.format(path=json.dumps(path))
                caption.change(None, [caption, captions], captions, js=js, queue=False)


def _picture(path: Path) -> str:
    data = thumbnail(path)
    return f'<img src="data:image/jpeg;base64,{data}" alt="{html.escape(path.name)}">'
