"""What all tabs share: who asks, where their things lie, the base, the queue, and messages."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from sbora_diffusion.app.drawing import Stopped, Studio
from sbora_diffusion.app.engine import Engine, Gate
from sbora_diffusion.app.job_store import JobStore
from sbora_diffusion.app.runner import Runner
from sbora_diffusion.app.workspace import Handout, Workspace, Workspaces
from sbora_diffusion.core.errors import SboraError

PRIVATE: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None}
"""Of events that belong to the page alone. They go through the queue, where an error becomes a
message; outside of it gradio answers with status 500."""
ONE_BY_ONE: dict[str, Any] = {
    "concurrency_limit": 1, "concurrency_id": "rows", "show_progress": "hidden",
}  # fmt: skip
"""Of what makes components while the page is open: gradio cannot make two sets at once."""
logger = logging.getLogger(__name__)


class Desk:
    """One for each server."""

    def __init__(self, workspaces: Workspaces):
        self.workspaces, self.engine = workspaces, Engine()
        self.handout, self.gate = Handout(), Gate()
        self._stores = {space.jobs: JobStore(space.jobs) for space in workspaces}
        self.runner = Runner(self._stores.values(), workspaces.home)

    def workspace(self, request: gr.Request) -> Workspace:
        """That of the person who asks."""
        return self.workspaces.of(request.username)

    def store(self, request: gr.Request) -> JobStore:
        """The jobs of the person who asks."""
        return self._stores[self.workspace(request).jobs]

    def studio(self, request: gr.Request) -> Studio:
        return Studio(self.workspace(request), self.engine, self.handout)


def empty_after(event: Any, place: gr.File) -> None:
    """Make an upload's place ready for the next one, however the event ended."""
    for ended in (event.success, event.failure):  # `then` is left out after an error
        ended(lambda: None, None, place, show_progress="hidden", **PRIVATE)


@contextmanager
def in_plain_words() -> Iterator[None]:
    """Errors become messages of the page; faults of the program go to the log as well."""
    try:
        yield
    except SboraError as error:
        raise gr.Error(_sentence(error), duration=None, print_exception=False) from error
    except Stopped as error:
        raise gr.Error("Stopped.", duration=3, title="", print_exception=False) from error
    except gr.Error:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            text = "Not enough memory for this; ask for fewer images."
        else:
            logger.exception("the request failed")
            text = "Something went wrong in the program; its terminal says what."
        raise gr.Error(text, duration=None, print_exception=False) from error


def _sentence(error: SboraError) -> str:
    text = str(error)
    return text[:1].upper() + text[1:]
