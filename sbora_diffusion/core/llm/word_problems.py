"""Arithmetic word problems made by rule, for training where no published set may be used.

Each problem is drawn from one of `PLOTS`, which are ours: one to three steps of +, −, × and ÷ over
whole numbers, told with names and things from the lists below, with a rationale that ends in "The
answer is N." as the LLM-Adapters sets have it. One seed gives one set. What is a test question,
after `normalized`, is left out, so that a set overlaps with none.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator

from sbora_diffusion.core.llm.data import Example

NAMES = (
    "Amina", "Bo", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hana", "Ivo", "Jun", "Kofi",
    "Lena", "Mateo", "Noor", "Oskar", "Priya", "Quentin", "Rosa", "Sven", "Tala", "Uma", "Viktor",
    "Wen", "Xenia", "Yusuf", "Zoe",
)  # fmt: skip
THINGS = (
    "acorns", "badges", "beads", "bolts", "bricks", "buttons", "candles", "cards", "chairs",
    "coins", "crates", "cups", "eggs", "envelopes", "feathers", "figs", "flags", "jars", "kites",
    "lamps", "lemons", "magnets", "nails", "olives", "pebbles", "pens", "photos", "plates",
    "postcards", "ribbons", "ropes", "seeds", "shells", "spoons", "stamps", "tiles", "tickets",
)  # fmt: skip
HOLDERS = ("bag", "basket", "box", "drawer", "pot", "rack", "sack", "shelf", "tin", "tray")
_NOT_LETTERS = re.compile(r"[^a-z0-9]+")

Draw = random.Random


def _gives(draw: Draw) -> tuple[str, str, int]:
    name, other = draw.sample(NAMES, 2)
    thing, have, less = draw.choice(THINGS), draw.randint(12, 400), draw.randint(2, 11)
    text = f"{name} owned {have} {thing} and handed {less} of them to {other}. How many {thing} "
    return (
        text + f"stayed with {name}?",
        f"{name} began with {have} and gave {less} away, so {have} - {less} = {have - less}.",
        have - less,
    )


def _joins(draw: Draw) -> tuple[str, str, int]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    days = [draw.randint(3, 95) for _ in range(draw.choice((2, 3)))]
    told = ", ".join(f"{n} on day {k}" for k, n in enumerate(days, 1))
    total = sum(days)
    return (
        f"Over {len(days)} days {name} gathered {thing}: {told}. How many {thing} is that?",
        f"Adding the days gives {' + '.join(map(str, days))} = {total}.",
        total,
    )


def _rows(draw: Draw) -> tuple[str, str, int]:
    thing, holder = draw.choice(THINGS), draw.choice(HOLDERS)
    each, count, loose = draw.randint(3, 24), draw.randint(2, 30), draw.randint(1, 20)
    product = each * count
    return (
        f"Each {holder} has room for {each} {thing}. {count} of them are full, and {loose} {thing} "
        "lie loose. How many are there together?",
        f"The full ones hold {each} * {count} = {product}. With the loose ones that is {product} + "
        f"{loose} = {product + loose}.",
        product + loose,
    )


def _shares(draw: Draw) -> tuple[str, str, int]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    people, share, kept = draw.randint(2, 12), draw.randint(2, 40), draw.randint(1, 30)
    total = people * share + kept
    return (
        f"Of {total} {thing} {name} kept {kept} and split the others evenly among {people} "
        f"neighbours. How many {thing} did each neighbour get?",
        f"There were {total} - {kept} = {total - kept} to split, so each got {total - kept} / "
        f"{people} = {share}.",
        share,
    )


def _buys(draw: Draw) -> tuple[str, str, int]:
    name = draw.choice(NAMES)
    first, second = draw.sample(THINGS, 2)
    a, b, m, n = (draw.randint(2, 15) for _ in range(4))
    purse = a * m + b * n + draw.randint(1, 60)
    spent = a * m + b * n
    return (
        f"At the market {first} cost {a} dollars apiece and {second} {b} dollars. {name} came with "
        f"{purse} dollars and took {m} {first} and {n} {second}. How many dollars were left?",
        f"The {first} cost {a} * {m} = {a * m} and the {second} {b} * {n} = {b * n}, together "
        f"{a * m} + {b * n} = {spent}. What is left is {purse} - {spent} = {purse - spent}.",
        purse - spent,
    )


def _compares(draw: Draw) -> tuple[str, str, int]:
    name, other = draw.sample(NAMES, 2)
    thing, few, times = draw.choice(THINGS), draw.randint(3, 60), draw.randint(2, 6)
    many = few * times
    return (
        f"{other} has {few} {thing}, and {name} has {times} times as many. How many {thing} more "
        f"than {other} does {name} have?",
        f"{name} has {few} * {times} = {many}. The difference is {many} - {few} = {many - few}.",
        many - few,
    )


def _earns(draw: Draw) -> tuple[str, str, int]:
    name = draw.choice(NAMES)
    rate, hours, days, cost = (draw.randint(*r) for r in ((6, 25), (2, 9), (2, 6), (1, 40)))
    daily = rate * hours
    total = daily * days
    return (
        f"{name} is paid {rate} dollars an hour and works {hours} hours a day. After {days} days "
        f"{name} pays {cost} dollars for the way home. How many dollars remain?",
        f"A day brings {rate} * {hours} = {daily}, and {days} days {daily} * {days} = {total}. "
        f"After paying, {total} - {cost} = {total - cost} remain.",
        total - cost,
    )


def _packs(draw: Draw) -> tuple[str, str, int]:
    name, thing, holder = draw.choice(NAMES), draw.choice(THINGS), draw.choice(HOLDERS)
    size, count = draw.randint(2, 20), draw.randint(2, 25)
    broken = draw.randint(1, 15)
    total = size * count + broken
    return (
        f"{name} had {total} {thing}, of which {broken} were broken. The whole ones were put away "
        f"with {size} in every {holder}. How many times was a {holder} filled?",
        f"Whole were {total} - {broken} = {total - broken}. Filling took {total - broken} / {size} "
        f"= {count} times.",
        count,
    )


PLOTS: tuple[Callable[[Draw], tuple[str, str, int]], ...] = (
    _gives, _joins, _rows, _shares, _buys, _compares, _earns, _packs,
)  # fmt: skip


def word_problems(seed: int, count: int, without: Iterable[str] = ()) -> list[Example]:
    """Different problems, as many of each plot as of any other.

    Args:
        without: questions that must not come out, e.g. those of the tests.
    """
    known = {normalized(question) for question in without}
    problems: list[Example] = []
    for example in _drawn(random.Random(seed)):
        if len(problems) == count:
            break
        key = normalized(example.instruction)
        if key not in known:
            known.add(key)
            problems.append(example)
    return problems


def normalized(question: str) -> str:
    """A question by its letters and digits alone, as overlaps are counted."""
    return _NOT_LETTERS.sub("", question.lower())


def _drawn(draw: Draw) -> Iterator[Example]:
    while True:
        for plot in PLOTS:
            question, rationale, answer = plot(draw)
            yield Example(question, f"{rationale} The answer is {answer}.", str(answer))
