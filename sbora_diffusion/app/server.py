"""Serves the app: `sbora app` or `python app.py`."""

import ipaddress
import os
import socket
from collections.abc import Sequence
from concurrent.futures import wait
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read while gradio is imported
# Else gradio keeps 10,000 events and makes a data frame of all of them at the end of each.
os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "1")
os.environ.setdefault("GRADIO_ANALYTICS_CACHE_FREQUENCY", str(2**31))
# Threads of torch that wait must not keep a core busy: a browser and trainings run beside the app,
# and without a core to spare each operation took ten times as long. Read while torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the pocket base needs no hub

import gradio as gr

from sbora_diffusion.app.desk import Desk
from sbora_diffusion.app.page import build
from sbora_diffusion.app.theme import CSS, HEAD, theme
from sbora_diffusion.app.workspace import EXAMPLES, Workspaces
from sbora_diffusion.core.errors import ConfigError, ResourceError

PAGES = 100
"""Open pages whose state is kept, about 1 MiB each."""
WARM_SECONDS = 8.0
"""The page opens after so long even if its base is not ready, as on a busy machine."""


def main(
    listen: str = "127.0.0.1",
    port: int = 7860,
    auth: Sequence[str] = (),
    library: str | Path | None = None,
    open_browser: bool = False,
    block: bool = True,
    examples: Path = EXAMPLES,
) -> gr.Blocks:
    """Serve the page.

    Args:
        auth: ``name:password`` of each person, needed when `listen` is not this machine alone;
            several people have a library each.
        library: the user's library file.
        block: wait until the server is stopped; otherwise it runs in a thread.
        examples: concept files that everybody sees.

    Raises:
        ConfigError: `listen` would let others in without a login, or `auth` is malformed.
        ResourceError: the port is in use.
    """
    logins = [_login(text) for text in auth]
    if not logins and not _is_loopback(listen):
        raise ConfigError(
            f"listening on {listen} lets others in without a login",
            "give --auth NAME:PASSWORD, or listen on 127.0.0.1",
        )
    _raise_if_in_use(listen, port)
    desk = Desk(Workspaces(library, examples, [name for name, _ in logins]))
    page = _ready_page(desk) if block else build(desk)
    page.launch(
        server_name=listen, server_port=port, auth=logins or None, share=False,
        inbrowser=open_browser, prevent_thread_lock=True, theme=theme(), css=CSS, head=HEAD,
        max_file_size="10mb", allowed_paths=[], show_error=False, ssr_mode=False, pwa=False,
        mcp_server=False, enable_monitoring=False, run_history=False, strict_cors=True,
        footer_links=[], state_session_capacity=PAGES, quiet=not block,
    )  # fmt: skip
    desk.runner.start()
    if block:
        try:
            page.block_thread()
        finally:
            desk.runner.close()
    return page


def _ready_page(desk: Desk) -> gr.Blocks:
    """The page, once its base can draw: one that opens sooner only competes with it."""
    print("Getting the base ready ...", flush=True)
    warm = desk.engine.warm_up()
    page = build(desk)
    wait([warm], WARM_SECONDS)
    return page


def _raise_if_in_use(listen: str, port: int) -> None:
    """Said before the base is read, which takes seconds."""
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    try:
        socket.create_server((listen, port), family=family).close()
    except OSError as error:
        raise ResourceError(f"{listen}:{port} is in use", "choose another --port") from error


def _login(auth: str) -> tuple[str, str]:
    name, _, password = auth.partition(":")
    if not name or not password:
        raise ConfigError("the login must be NAME:PASSWORD, both not empty", "e.g. ada:s3cret")
    return name, password


def _is_loopback(listen: str) -> bool:
    try:
        return listen == "localhost" or ipaddress.ip_address(listen).is_loopback
    except ValueError:
        return False
