"""A running app on the pocket base, and a browser before it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ui import browser as chromium

START_SECONDS = 300
WAIT_MILLISECONDS = 120_000


def pytest_collection_modifyitems(items):
    for item in items:
        timed = item.get_closest_marker("pace")
        if Path(__file__).parent in Path(item.path).parents and not timed:
            item.add_marker(pytest.mark.ui)


@dataclass
class Served:
    """An app in a process of its own; `started` is how many seconds it took to answer."""

    url: str
    folder: Path
    process: subprocess.Popen
    started: float

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(folder: Path, *options: str) -> Served:
    """Start `sbora app` with an empty library in a folder."""
    port, began = free_port(), time.monotonic()
    environment = {
        **os.environ,
        "SBORA_LIBRARY": str(folder / "library.sqlite3"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "sbora_diffusion", "app", "--port", str(port), *options]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    while time.monotonic() < began + START_SECONDS and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                taken = time.monotonic() - began
                return Served(f"http://127.0.0.1:{port}", folder, process, taken)
        time.sleep(0.1)
    raise RuntimeError((folder / "server.log").read_text())


def end(served: Served) -> None:
    served.process.send_signal(2)
    try:
        served.process.wait(60)
    except subprocess.TimeoutExpired:
        served.process.kill()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Iterator[Served]:
    app = serve(tmp_path_factory.mktemp("app"))
    yield app
    end(app)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = chromium.find()
    if path is None:
        pytest.fail(chromium.NEEDED)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=chromium.ARGUMENTS)
        yield started
        started.close()


@pytest.fixture
def page(served, browser):
    """A fresh page; at its end nothing may have gone wrong in it unseen."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    context.set_default_timeout(WAIT_MILLISECONDS)
    page, problems = context.new_page(), []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda r: problems.append(r.url) if r.status >= 500 else None)
    page.goto(served.url)
    page.locator(".concept").first.wait_for()
    yield page
    context.close()
    assert problems == []
