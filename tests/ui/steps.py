"""What a person does on the page."""

import re
import struct
import zlib
from io import BytesIO
from pathlib import Path

from PIL import Image

CONCEPTS = Path(__file__).parents[2] / "concepts"
LONG = 300_000
QUICK = {"batch_size": "1", "copies": "1", "preservation": "0"}


def tab(page, name: str) -> None:
    place, more = (
        page.get_by_role("tab", name=name, exact=True),
        page.locator(".overflow-menu > button"),
    )
    place.or_(more).filter(visible=True).first.wait_for()  # a page that opens has none yet
    if not place.is_visible():  # a narrow page has the last ones in a menu
        more.click()
        place = page.locator(".overflow-dropdown button", has_text=name)
    place.click()


def opened(page, heading: str) -> None:
    page.get_by_role("button", name=heading).filter(visible=True).first.click()


def message(page, words: str) -> None:
    """A message of the page that says this; it is closed again."""
    toast = page.locator(".toast-body", has_text=re.compile(re.escape(words), re.IGNORECASE))
    toast.first.wait_for()
    toast.first.locator("button").click()
    toast.first.wait_for(state="hidden")


def drawn(page, prompt: str | None = None) -> list[Image.Image]:
    """Press Generate; the pictures that come."""
    if prompt is not None:
        page.locator("#prompt textarea").fill(prompt)
    command = page.locator("#command textarea")
    page.evaluate("document.querySelector('#command textarea').dataset.old = 'yes'")
    before = command.input_value()
    page.locator("#generate").click()
    page.wait_for_function(
        "old => { const now = document.querySelector('#command textarea').value;"
        " return now && now !== old }",
        arg=before, timeout=LONG,
    )  # fmt: skip
    page.locator("#gallery img").first.wait_for()
    return shown(page)


def shown(page, where: str = "#gallery") -> list[Image.Image]:
    """The pictures of a gallery, as the browser fetches them."""
    urls = [image.get_attribute("src") for image in page.locator(f"{where} button img").all()]
    fetched = [page.request.get(url) for url in dict.fromkeys(urls)]
    assert [answer.status for answer in fetched] == [200] * len(fetched)
    return [Image.open(BytesIO(answer.body())) for answer in fetched]


def switch(page, name: str, on: bool, verb: str = "use") -> None:
    page.get_by_label(f"{verb} {name}", exact=True).set_checked(on)


def make_concept(page, name: str, noun: str, pictures: list[Path]) -> None:
    """Upload pictures and save them as a concept."""
    tab(page, "Concepts")
    page.locator("#pictures input[type=file]").set_input_files(pictures)
    page.locator(".picture img").nth(len(pictures) - 1).wait_for()
    page.locator("#name input, #name textarea").fill(name)
    page.locator("#noun input, #noun textarea").fill(noun)
    page.locator("#save").click()
    page.locator("#saved", has_text=f"{name} is saved").wait_for()


def start_training(page, name: str, **settings: str) -> None:
    """Fill the form and press Train."""
    tab(page, "Train")
    choose(page, "#subject", name)
    for heading in ("Length and batch", "Pictures", "Keeping what the base knows"):
        if not page.locator("#set-steps").is_visible() or heading != "Length and batch":
            opened(page, heading)
    for field, value in {**QUICK, **settings}.items():
        page.locator(f"#set-{field} input").fill(value)
        page.locator(f"#set-{field} input").press("Tab")
    page.locator("#train").click()


def choose(page, where: str, text: str) -> None:
    """An entry of a list that opens."""
    page.locator(f"{where} input").click()
    page.get_by_role("option", name=text).first.click()


def watch_steps(page) -> None:
    """From now on the page keeps each number of steps that the training's panel shows."""
    page.evaluate(
        "() => { const view = document.querySelector('#train-view'); window.steps = [];"
        " new MutationObserver(() => { const now = /training (\\d+) of/.exec(view.innerText);"
        " if (now) window.steps.push(Number(now[1])); })"
        ".observe(view, {subtree: true, childList: true, characterData: true}); }"
    )


def state(page, panel: str = "train"):
    """The element that shows the chosen job."""
    return page.locator(f"#{panel}-view .job")


def wait_for_state(page, wanted: str, title: str, panel: str = "train") -> None:
    """Until the panel shows a job of that title in that state."""
    view = page.locator(f'#{panel}-view .job[data-state="{wanted}"]', has_text=title)
    view.wait_for(timeout=LONG)


def stop(page) -> None:
    page.get_by_role("button", name="Stop", exact=True).filter(visible=True).click()


def bomb() -> bytes:
    """A PNG of 400 megapixels in a few hundred bytes."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))


def fetched(page, panel: str, folder: Path) -> Path:
    """The file that a job made, as the browser downloads it."""
    if not page.locator(f"#{panel}-fetch").is_visible():
        opened(page, "Command, and the file")
    page.locator(f"#{panel}-fetch").click()
    link = page.locator(f"#{panel}-file a[download]").first
    link.wait_for()
    answer = page.request.get(link.get_attribute("href"))
    assert answer.status == 200
    path = folder / f"{panel}.bin"
    path.write_bytes(answer.body())
    return path
