"""A few concepts in every condition, always from the same seed."""

from PIL import Image

from merging_study.archive import Archive
from merging_study.plan import ALL, BASE, CLASS_WORD, MIXED, SAME, SINGLE, UNRELATED
from sbora_diffusion.contact_sheet import Sheet

COLUMNS = (CLASS_WORD, SINGLE, SAME, MIXED, ALL)
CONCEPTS, SHOWN = 5, (0, 3)  # of how many concepts, and which of the prompts
UNRELATED_SHOWN = 6  # pairs


def merging_sheet(archive: Archive) -> Image.Image:
    """Rows of concepts × prompts, then pairs of unrelated prompts."""
    facts = archive.facts
    sheet = Sheet(columns=2 * len(COLUMNS))
    for name in _spread(list(facts["concepts"])):
        prompts = [facts["settings"]["prompts"][k] for k in SHOWN]
        sheet.heading(*(prompt.format(f"<{name}>") for prompt in prompts))
        sheet.row([tile for prompt in SHOWN for tile in _tiles(archive, name, prompt)])
    sheet.heading("prompts that name no concept, before and after all are merged")
    before, after = (archive.groups[f"{UNRELATED}/{name}"] for name in (BASE, ALL))
    pairs = list(zip(before, after, facts["unrelated"], strict=True))
    for start in (0, len(COLUMNS)):
        tiles = []
        for old, new, prompt in pairs[start : start + len(COLUMNS)]:
            tiles += [(old, prompt.removeprefix("a photo of ")[:28]), (new, "all merged")]
        sheet.row(tiles)
    return sheet.image()


def _spread(names: list[str]) -> list[str]:
    """A few, spread over all."""
    count = min(CONCEPTS, len(names))
    return [names[k * len(names) // count] for k in range(count)]


def _tiles(archive: Archive, name: str, prompt: int) -> list[tuple[Image.Image, str]]:
    picture = prompt * archive.facts["settings"]["num"]
    tiles = []
    for condition in COLUMNS:
        groups = [g for g in archive.groups if f"{g}/".startswith(f"{condition}/{name}/")]
        others = [other for other in groups[0].split("/")[-1].split("+") if other != name]
        label = f"with {', '.join(others)}" if others else condition.replace("_", " ")
        tiles.append((archive.groups[groups[0]][picture], label[:28]))
    return tiles
