"""What a first-time user does: draw, teach a concept, draw with it."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sbora_diffusion.core.concept_set import read_concepts
from tests.ui.steps import (
    CONCEPTS,
    LONG,
    bomb,
    choose,
    drawn,
    fetched,
    make_concept,
    message,
    opened,
    start_training,
    state,
    stop,
    switch,
    tab,
    wait_for_state,
    watch_steps,
)

CAT = sorted((CONCEPTS / "siamese").glob("*.jpg"))


def test_two_concepts_in_regions_of_their_own(page):
    page.locator("#num input[type=number]").fill("2")
    page.locator("#num input[type=number]").press("Tab")
    whole = drawn(page)
    assert len(whole) == 2 and whole[0].size == (128, 128)
    opened(page, "Regions")
    page.get_by_role("button", name="Side by side").click()
    page.locator("#region-canvas .region").nth(1).wait_for()
    apart = drawn(page)
    parts = apart[0].text["sbora"]
    assert '"regions":{"baseballcap":[0.0,0.0,0.5,1.0],"plushbear":[0.5,0.0,1.0,1.0]}' in parts
    assert not np.array_equal(np.asarray(whole[0]), np.asarray(apart[0]))
    command = page.locator("#command textarea").input_value()
    assert "--region baseballcap=0,0,0.5,1" in command


def test_a_wide_picture_is_compared_with_the_base_alone(page):
    page.locator("#size input").fill("96 × 64")
    page.locator("#size input").press("Tab")
    opened(page, "Compare with the base alone")
    page.locator("#compare").click()
    page.locator("#comparison img").nth(1).wait_for(timeout=LONG)
    urls = [image.get_attribute("src") for image in page.locator("#comparison img").all()[:2]]
    alone, drawn_with = (Image.open(io.BytesIO(page.request.get(url).body())) for url in urls)
    assert alone.size == drawn_with.size == (96, 64)
    told = [json.loads(picture.text["sbora"]) for picture in (alone, drawn_with)]
    names = [[concept["name"] for concept in one["concepts"]] for one in told]
    assert sorted(names) == [[], ["baseballcap", "plushbear"]]


def test_a_region_is_moved_by_the_keyboard_and_by_the_pointer(page):
    opened(page, "Regions")
    page.get_by_role("button", name="Side by side").click()
    region = page.locator("#region-canvas .region").first
    region.focus()
    page.keyboard.press("ArrowRight")
    field = page.locator("#regions textarea")
    assert field.input_value().startswith("baseballcap=0.05,0,0.55,1\n")
    page.keyboard.press("Shift+ArrowUp")
    assert field.input_value().startswith("baseballcap=0.05,0,0.55,0.95\n")
    box = region.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] - 200, box["y"] + 60, steps=4)
    page.mouse.up()
    assert field.input_value().startswith("baseballcap=0,0,0.5,0.95\n")


def test_five_pictures_become_a_concept_that_can_be_drawn(page):
    make_concept(page, "mycat", "cat", CAT)
    start_training(page, "mycat", steps="30")
    wait_for_state(page, "running", "mycat")
    opened(page, "Command, and the file")
    command = page.locator("#train-command textarea").input_value()
    assert command.startswith("sbora train ") and "-s steps=30" in command
    page.reload()
    tab(page, "Train")
    state(page).filter(has_text="mycat").wait_for()
    wait_for_state(page, "done", "mycat")
    tab(page, "Generate")
    switch(page, "baseballcap", False)
    switch(page, "plushbear", False)
    switch(page, "mycat", True)
    pictures = drawn(page, "a photo of <mycat> on the beach")
    assert '"name":"mycat"' in pictures[0].text["sbora"]
    tab(page, "Concepts")
    page.locator("#known", has_text="mycat").wait_for()
    page.locator("#room", has_text="1 concept at rank 8 owns 8 of 160 columns").wait_for()


def test_a_stopped_training_goes_on_where_it_was_and_others_wait(page):
    for name in ("first", "second"):
        make_concept(page, name, "cat", CAT[:2])
    start_training(page, "first", steps="400")
    wait_for_state(page, "running", "first")
    page.locator("#train-view", has_text=re.compile("training [1-9]")).wait_for(timeout=LONG)
    choose(page, "#subject", "second")
    page.locator("#train").click()
    wait_for_state(page, "queued", "second")
    stop(page)
    wait_for_state(page, "stopped", "second")
    choose(page, "#train-job", "first")
    wait_for_state(page, "running", "first")
    stop(page)
    wait_for_state(page, "stopped", "first")
    done = re.search(r"training (\d+) of 400", page.locator("#train-view").inner_text())
    watch_steps(page)
    page.locator("#train-resume").click()
    wait_for_state(page, "running", "first")
    page.wait_for_function(f"window.steps.some(step => step > {done[1]})", timeout=LONG)
    assert min(page.evaluate("window.steps")) >= int(done[1])
    stop(page)
    wait_for_state(page, "stopped", "first")


def test_wrong_uploads_give_messages(page, tmp_path):
    tab(page, "Concepts")
    wrong = {
        "page.png": b"<html><script>alert(1)</script></html>", "bomb.png": bomb(), "empty.jpg": b"",
    }  # fmt: skip
    for name, data in wrong.items():
        (tmp_path / name).write_bytes(data)
        page.locator("#pictures input[type=file]").set_input_files(tmp_path / name)
        message(page, name)
    page.locator("#save").click()
    message(page, "The concept has no name")
    page.locator("#name input, #name textarea").fill("../up")
    page.locator("#noun input, #noun textarea").fill("cat")
    page.locator("#save").click()
    message(page, "the concept: name")


def test_concepts_are_checked_merged_and_exported(page, tmp_path):
    tab(page, "Merge")
    switch(page, "plushbear", True, "merge")
    switch(page, "trex", True, "merge")
    page.locator("#check").click()
    page.locator("#verdict .good", has_text="can live in one model").wait_for()
    page.get_by_label("A concept set").check()
    page.locator("#merge-name input, #merge-name textarea").fill("pair")
    page.locator("#merge").click()
    wait_for_state(page, "done", "pair", "merge")
    assert len(read_concepts(fetched(page, "merge", tmp_path)).concepts) == 2
    page.locator("#merge").click()
    message(page, "There is pair.safetensors already")
    tab(page, "Export")
    switch(page, "plushbear", True, "export")
    page.locator("#export").click()
    wait_for_state(page, "done", "plushbear-kohya", "export")
    with zipfile.ZipFile(fetched(page, "export", tmp_path)) as archive:
        assert any(name.endswith(".safetensors") for name in archive.namelist())


def test_the_settings_of_a_picture_come_back(page, tmp_path):
    page.locator("#seed input").fill("7")
    page.locator("#seed input").press("Tab")
    picture = drawn(page, "a photo of <plushbear> in space")[0]
    page.locator("#prompt textarea").fill("something else")
    switch(page, "baseballcap", False)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("sbora", picture.text["sbora"])
    picture.save(tmp_path / "picture.png", pnginfo=chunks)
    opened(page, "Take the settings")
    expect = pytest.importorskip("playwright.sync_api").expect
    page.locator("#restore input[type=file]").set_input_files(tmp_path / "picture.png")
    page.wait_for_function("document.querySelector('#prompt textarea').value.includes('in space')")
    expect(page.get_by_label("use baseballcap", exact=True)).to_be_checked()
    assert page.locator("#seed input").input_value() == "7"
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for _ in range(2):  # the place is free again, and nothing covers the page
        page.locator("#restore input[type=file]").first.set_input_files(tmp_path / "plain.png")
        message(page, "plain.png says nothing about how it was drawn")
    expect(page.get_by_text("Error", exact=True).filter(visible=True)).to_have_count(0)
    page.locator("#prompt textarea").fill("something else")
