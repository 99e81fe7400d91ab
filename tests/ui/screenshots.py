"""Pictures of every tab in light, in dark and on a phone: `python -m tests.ui.screenshots DIR`."""

import re
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.ui.browser import NEEDED, find
from tests.ui.conftest import end, serve
from tests.ui.steps import CONCEPTS, LONG, drawn, make_concept, opened, start_training, switch, tab

TABS = ("Generate", "Concepts", "Train", "Merge", "Evaluate", "Export")
LOOKS = {"light": (1200, "light"), "dark": (1200, "dark"), "phone": (390, "light")}
SETTLED = 1500


def shoot(page, folder: Path, look: str) -> None:
    for name in TABS:
        tab(page, name)
        page.wait_for_timeout(SETTLED)
        page.screenshot(path=folder / f"{name.lower()}-{look}.png", full_page=True)


def at_work(page) -> None:
    """Something to see on each tab: pictures in regions, a training, a check."""
    make_concept(page, "mycat", "cat", sorted((CONCEPTS / "siamese").glob("*.jpg")))
    start_training(page, "mycat", steps="60", batch_size="2")
    tab(page, "Merge")
    switch(page, "plushbear", True, "merge")
    switch(page, "trex", True, "merge")
    page.locator("#check").click()
    page.locator("#verdict .good").wait_for()
    tab(page, "Generate")
    opened(page, "Regions")
    page.get_by_role("button", name="Side by side").click()
    drawn(page)
    page.locator("#train-view .loss", has_text=re.compile(r"loss \d")).wait_for(
        state="attached", timeout=LONG
    )


def main() -> int:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if not (path := find()):
        print(NEEDED, file=sys.stderr)
        return 1
    served = serve(Path(tempfile.mkdtemp()))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            for look, (width, scheme) in LOOKS.items():
                page = browser.new_page(viewport={"width": width, "height": 850})
                page.set_default_timeout(120_000)
                page.goto(f"{served.url}/?__theme={scheme}")
                page.locator(".concept").first.wait_for()
                if look == "light":
                    shoot(page, folder, "empty")
                    at_work(page)
                else:
                    drawn(page)
                shoot(page, folder, look)
                page.close()
    finally:
        end(served)
    return 0


if __name__ == "__main__":
    sys.exit(main())
