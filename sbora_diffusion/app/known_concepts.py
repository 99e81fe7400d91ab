"""What is known in a workspace, as a table, and who owns which columns and rows."""

import html
from typing import TYPE_CHECKING

from sbora_diffusion.app.subjects import find_subjects
from sbora_diffusion.app.workspace import Workspace
from sbora_diffusion.holdings import holdings, picture
from sbora_diffusion.library import Library

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("concept", "token", "slot", "indices", "is")


def known_table(workspace: Workspace) -> str:
    """Concepts of the library, folders that wait to be trained, and the examples."""
    entries = workspace.library.concepts()
    rows = [
        [e.name, e.token or "", str(e.slot), f"{e.start}–{e.stop - 1}",
         "trained" if e.path else "in training"]
        for e in entries
    ]  # fmt: skip
    names = {entry.name for entry in entries}
    rows += [
        [name, subject.settings.token, "", "", f"{len(subject.images)} pictures, not trained yet"]
        for name, subject in find_subjects(workspace).items()
        if name not in names
    ]
    shown = {row[0] for row in rows}
    rows += [
        [card.name, card.token, "", "", "an example"]
        for card in workspace.cards()[0]
        if card.name not in shown
    ]
    return table(COLUMNS, rows)


def ownership(library: Library) -> "tuple[str, Image | None]":
    """Room that is left, in words, and the map; no map of an empty library."""
    found = holdings(library)
    if not found:
        return '<p class="empty">Nobody yet: the first concept gets slot 0.</p>', None
    lines = [
        f"<p>SBoRA-{one.variant.upper()} on {html.escape(one.base)}: {html.escape(one.price)}.</p>"
        for one in found
    ]
    return "".join(lines), picture(found)


def table(columns: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table that scrolls by itself where the page is narrow."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    parts = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{parts}</table></div>'
