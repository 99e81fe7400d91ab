"""What a person comes to later: a camera, another base, judging, predicting, files of others."""

from pathlib import Path

import pytest

from sbora_diffusion.library import EXAMPLES
from tests.diffusion.thin_sd15 import thin_sd15
from tests.ui.conftest import end, serve
from tests.ui.steps import choose, drawn, message, opened, switch, tab, wait_for_state


def test_the_camera_takes_one_picture_after_the_other(page):
    tab(page, "Concepts")
    opened(page, "Take a picture")
    for taken in (1, 2):
        page.get_by_role("button", name="Click to Access Webcam").click()
        page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
        page.locator("#camera .button-wrap button").first.click()
        page.locator(".picture img").nth(taken - 1).wait_for()
    page.locator("#name input, #name textarea").fill("pattern")
    page.locator("#noun input, #noun textarea").fill("toy")
    page.locator("#save").click()
    page.locator("#saved", has_text="pattern is saved").wait_for()
    page.locator("#known", has_text="2 pictures").wait_for()


def test_a_concept_is_judged_in_figures_and_pictures(page):
    tab(page, "Evaluate")
    choose(page, "#judged", "trex")
    page.locator("#judge-steps input[type=number]").fill("2")
    page.locator("#judge-steps input[type=number]").press("Tab")
    page.locator("#evaluate").click()
    wait_for_state(page, "done", "trex", "evaluate")
    for words in ("text alignment", "image alignment"):
        page.locator("#evaluate-view", has_text=words).wait_for()
    page.locator("#evaluate-pictures img").first.wait_for()
    opened(page, "Command, and the file")
    command = page.locator("#evaluate-command textarea").input_value()
    assert command.startswith("sbora evaluate trex")


def test_crosstalk_is_predicted_before_anything_is_merged(page):
    tab(page, "Merge")
    for name in ("plushbear", "trex"):
        switch(page, name, True, "merge")
    page.locator("#predict").click()
    wait_for_state(page, "done", "plushbear", "merge")
    predicted = page.locator("#merge-view table", has_text="calibrated")
    predicted.filter(has_text="trex").wait_for()


@pytest.fixture
def fresh(browser, tmp_path, pocket):
    """A page of an app that has another base, and no examples of it."""
    app = serve(tmp_path)
    thin_sd15(pocket).pipeline.save_pretrained(tmp_path / "library.app" / "bases" / "thin")
    page = browser.new_page()
    page.set_default_timeout(120_000)
    page.goto(app.url)
    page.locator(".concept").first.wait_for()
    yield page
    page.close()
    end(app)


def test_another_base_is_chosen_for_all_tabs_and_pocket_again(fresh):
    opened(fresh, "Advanced")
    choose(fresh, "#base", "thin")
    fresh.locator("text=No concepts yet").filter(visible=True).first.wait_for()
    pictures = drawn(fresh, "a photo of a dog")
    assert '"concepts":[]' in pictures[0].text["sbora"]
    assert "--base" in fresh.locator("#command textarea").input_value()
    fresh.reload()
    tab(fresh, "Merge")
    fresh.locator("text=No concepts yet").filter(visible=True).first.wait_for()
    tab(fresh, "Generate")
    opened(fresh, "Advanced")
    choose(fresh, "#base", "pocket")
    fresh.get_by_label("use plushbear", exact=True).wait_for()


def test_a_concept_file_of_somebody_else_is_brought_in(fresh, tmp_path):
    tab(fresh, "Export")
    opened(fresh, "Bring in a concept file")
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_bytes(b"nothing")
    place = fresh.locator("#import input[type=file]")
    place.set_input_files(wrong)
    message(fresh, "wrong.safetensors")
    place.set_input_files(Path(EXAMPLES) / "trex.safetensors")
    fresh.locator("#brought", has_text="trex").wait_for()
    tab(fresh, "Concepts")
    fresh.locator("#known tr", has_text="trex").filter(has_text="trained").wait_for()
