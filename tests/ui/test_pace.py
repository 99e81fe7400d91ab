"""How long a person waits for the app and for the first picture, on two cores."""

import time

import pytest

from tests.ui.conftest import end, serve
from tests.ui.steps import drawn

START_SECONDS, FIRST_PICTURE_SECONDS = 15, 10


@pytest.mark.pace
def test_the_app_starts_and_draws_its_first_picture_in_seconds(browser, tmp_path, record_property):
    app = serve(tmp_path)
    try:
        page = browser.new_page()
        began = time.monotonic()
        page.goto(app.url)
        page.locator(".concept").first.wait_for()
        opened = time.monotonic()
        drawn(page)
        ended = time.monotonic()
        page.close()
    finally:
        end(app)
    figures = {"start": app.started, "page": opened - began, "first picture": ended - began}
    for what, seconds in figures.items():
        print(f"{what}: {seconds:.1f} s")
        record_property(f"{what}, seconds", round(seconds, 1))
    assert app.started <= START_SECONDS
    assert ended - began <= FIRST_PICTURE_SECONDS
