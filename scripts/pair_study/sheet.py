"""Some pairs in all conditions, as one picture."""

from collections.abc import Mapping

from PIL import Image

from pair_study.plan import Pair
from pair_study.report import JUDGED_FOR_GOAL, Judged, PairJudge
from sbora_diffusion.contact_sheet import PAPER, TILE, Sheet

COLUMNS = 8
TITLES = {
    "sbora": "SBoRA, without regions",
    "sbora-regions": "SBoRA, with regions",
    "lora": "LoRA, without regions",
    "lora-regions": "LoRA, with regions",
}


def chosen_pairs(judge: PairJudge, judged: Judged) -> list[int]:
    """Half of them within one category: the worst of each half, then evenly down to the best."""
    order = judged.worst_first(judge.judges[0].name)
    within = judge.within(judged.drawn.pairs)
    halves = [[k for k in order if within[k] == same] for same in (True, False)]
    return [k for half in halves for k in _evenly(half, COLUMNS // 2)]


def pair_sheet(judge: PairJudge, judged: Mapping[str, Judged]) -> Image.Image:
    """A column for each pair: references, then the first picture in each condition."""
    goal = judged.get(JUDGED_FOR_GOAL) or next(iter(judged.values()))
    columns = chosen_pairs(judge, goal)
    sheet = Sheet(columns=COLUMNS)
    sheet.heading("references: left and right")
    pairs = [goal.drawn.pairs[k] for k in columns]
    sheet.row([(_references(judge, pair), " + ".join(pair)) for pair in pairs])
    for condition, found in judged.items():
        sheet.heading(f"{TITLES[condition]}; regions of the pair that are right")
        sheet.row([_tile(found, k, judge.judges[0].name) for k in columns])
    return sheet.image()


def _tile(judged: Judged, pair: int, judge: str) -> tuple[Image.Image, str]:
    each = len(judged.drawn.files) // len(judged.drawn.pairs)
    with Image.open(judged.drawn.files[pair * each]) as picture:
        right = round(float(judged.shares[judge][pair]) * 2 * each)
        return picture.convert("RGB"), f"{right} of {2 * each}"


def _references(judge: PairJudge, pair: Pair) -> Image.Image:
    tile, half = Image.new("RGB", (TILE, TILE), PAPER), TILE // 2
    for k, name in enumerate(pair):
        tile.paste(judge.pictures[name][0].resize((half, half)), (k * half, half // 2))
    return tile


def _evenly(items: list[int], count: int) -> list[int]:
    if len(items) <= count:
        return items
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]
