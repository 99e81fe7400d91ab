"""How often the judge finds in the base's pictures what the prompt asked for, and what fails."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from pocket_evaluation.drawing import Drawer
from pocket_evaluation.free_wording import FREE, plain
from pocket_evaluation.questions import QUESTIONS, Prompt, answers, scene, subject
from pocket_evaluation.record import share
from pocket_evaluation.scenes import SETS, Case, CaseSet, World, generator
from sbora_diffusion.evaluation.features import ClipFeatures

TEXTS_AT_ONCE = 512
CONFUSIONS = 12
FEW, SOME, MANY = 5, 12, 30  # sprites of a noun
BOTH = "both_subjects"


@dataclass
class Judged:
    """Cases of one kind: their pictures, and the answers to what was asked about them.

    Attributes:
        truths: question → what is right, case by case.
        drawn, real: question → what the judge found in the base's and in the composed pictures.
    """

    cases: Sequence[Case]
    pictures: Sequence[Image.Image]
    composed: Sequence[Image.Image]
    truths: dict[str, list[str]] = field(default_factory=dict)
    drawn: dict[str, list[str]] = field(default_factory=dict)
    real: dict[str, list[str]] = field(default_factory=dict)

    def right(self, found: Mapping[str, list[str]]) -> dict[str, list[bool]]:
        """Question → case by case whether the answer is right; both subjects count as one."""
        right = {
            ask: [a == b for a, b in zip(found[ask], truth, strict=True)]
            for ask, truth in self.truths.items()
        }
        if "second_subject" in right:
            pairs = zip(right["subject"], right["second_subject"], strict=True)
            right[BOTH] = [first and second for first, second in pairs]
        return right


def judge_base(
    world: World, drawer: Drawer, clip: ClipFeatures, number: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[str, Judged]]:
    """The section, and what the contact sheet shows of it."""
    figures: dict[str, Any] = {"judge": clip.name, "number": number, **drawer.settings()}
    judged = {}
    for kind in SETS:
        judged[kind.name] = found = judge_set(kind, world, drawer, clip, number)
        figures[kind.name] = set_figures(kind, found, world.sprites_of)
        say(f"{kind.name}: {_line(figures[kind.name])}")
    repeats = max(1, number // 100)
    figures["free_wording"] = judge_free_wording(world, drawer, clip, repeats)
    say(f"free_wording: {_line(figures['free_wording'])}")
    return figures, judged


def _line(figures: Mapping[str, Any]) -> str:
    shares = {k: v["value"] for k, v in figures.items() if isinstance(v, dict) and "value" in v}
    return ", ".join(f"{name} {value:.3f}" for name, value in shares.items())


def judge_set(
    kind: CaseSet, world: World, drawer: Drawer, clip: ClipFeatures, number: int
) -> Judged:
    """Draw a set's prompts, compose their real pictures, and ask the judge about both."""
    cases = kind.cases(world, generator(drawer.seed, kind.name), number)
    pictures = drawer.draw(f"base/{kind.name}", [case.prompt.text() for case in cases])
    judged = Judged(cases, pictures, world.compose([case.plan for case in cases]))
    drawn, real = clip.images(judged.pictures), clip.images(judged.composed)
    for ask in kind.asks:
        rng = generator(drawer.seed, f"{kind.name} {ask}")
        questions = [QUESTIONS[ask](case.prompt, world.nouns, rng) for case in cases]
        judged.truths[ask] = [question.truth for question in questions]
        judged.drawn[ask] = answers(drawn, questions, _texts(clip))
        judged.real[ask] = answers(real, questions, _texts(clip))
    return judged


def _texts(clip: ClipFeatures) -> Callable:
    return lambda texts: clip.texts(texts, TEXTS_AT_ONCE)


def set_figures(kind: CaseSet, judged: Judged, sprites_of: Mapping[str, int]) -> dict[str, Any]:
    """Shares with thresholds, the ceiling, and the kinds of failure."""
    thresholds = dict(kind.thresholds)
    drawn, real = judged.right(judged.drawn), judged.right(judged.real)
    figures: dict[str, Any] = {
        ask: share(right, thresholds.get(ask)) for ask, right in drawn.items()
    }
    figures["real_composed_scenes"] = {ask: share(right) for ask, right in real.items()}
    figures["wrong_where_the_real_one_is_right"] = {
        ask: _wrong_alone(right, real[ask]) for ask, right in drawn.items()
    }
    figures["confusions"] = {
        ask: confusions(judged.truths[ask], judged.drawn[ask]) for ask in kind.asks
    }
    figures["subject_by"] = by_kind(judged.cases, drawn["subject"], sprites_of)
    if BOTH in drawn:
        figures["found_of_two"] = found_of_two(drawn["subject"], drawn["second_subject"])
    if kind.vary or kind.sized or len(kind.relations) > 1:
        ask = kind.asks[0]
        figures[f"{ask}_by_what_was_asked"] = grouped(judged.truths[ask], drawn[ask])
    return figures


def _wrong_alone(drawn: Sequence[bool], real: Sequence[bool]) -> dict[str, int]:
    """Of the wrong pictures, how many the judge cannot be blamed for."""
    wrong = [there for here, there in zip(drawn, real, strict=True) if not here]
    return {"wrong": len(wrong), "real_one_right": sum(wrong)}


def confusions(asked: Sequence[str], found: Sequence[str]) -> list[dict[str, Any]]:
    """The most frequent wrong answers."""
    wrong = Counter((a, f) for a, f in zip(asked, found, strict=True) if a != f)
    return [
        {"asked": a, "found": f, "count": count} for (a, f), count in wrong.most_common(CONFUSIONS)
    ]


def by_kind(
    cases: Sequence[Case], right: Sequence[bool], sprites_of: Mapping[str, int]
) -> dict[str, Any]:
    """How often the first subject is found, by what is known about it."""
    first = [case.sprites[0] for case in cases]
    return {
        "art_set": grouped([sprite.style for sprite in first], right),
        "category": grouped([sprite.category for sprite in first], right),
        "sprites_of_the_noun": grouped([_amount(sprites_of[s.noun]) for s in first], right),
    }


def _amount(sprites: int) -> str:
    if sprites <= FEW:
        return f"1 to {FEW}"
    if sprites <= SOME:
        return f"{FEW + 1} to {SOME}"
    return f"{SOME + 1} to {MANY}" if sprites <= MANY else f"more than {MANY}"


def grouped(keys: Sequence[str], right: Sequence[bool]) -> dict[str, Any]:
    """The share of what is right in each group."""
    groups: dict[str, list[bool]] = {}
    for key, good in zip(keys, right, strict=True):
        groups.setdefault(key, []).append(good)
    return {key: share(groups[key]) for key in sorted(groups)}


def found_of_two(first: Sequence[bool], second: Sequence[bool]) -> dict[str, int]:
    """Which of two subjects were found, in how many pictures."""
    names = {(1, 1): "both", (1, 0): "first_only", (0, 1): "second_only", (0, 0): "none"}
    counts = Counter(zip(map(int, first), map(int, second), strict=True))
    return {name: counts[pair] for pair, name in names.items()}


def judge_free_wording(
    world: World, drawer: Drawer, clip: ClipFeatures, repeats: int
) -> dict[str, Any]:
    """Free wording against plain words, by the questions to the plain prompt."""
    prompts = [plain(noun, place) for _, noun, place in FREE for _ in range(repeats)]
    free = [text for text, _, _ in FREE for _ in range(repeats)]
    wordings = {"plain": [prompt.text() for prompt in prompts], "free": free}
    figures: dict[str, Any] = {"prompts": len(FREE), "pictures_a_prompt": repeats}
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for name, texts in wordings.items():
        features = clip.images(drawer.draw(f"base/free_wording_{name}", texts))
        right = _asked(world, clip, drawer.seed, features, prompts)
        figures |= {f"{ask}_{name}": share(found) for ask, found in right.items()}
        by_prompt[name] = [
            {ask: sum(found[k : k + repeats]) for ask, found in right.items()}
            for k in range(0, len(texts), repeats)
        ]
    figures["right_by_prompt"] = [
        {"prompt": row[0], "free": f, "plain": p}
        for row, f, p in zip(FREE, by_prompt["free"], by_prompt["plain"], strict=True)
    ]
    return figures


def _asked(
    world: World, clip: ClipFeatures, seed: int, features: Any, prompts: Sequence[Prompt]
) -> dict[str, list[bool]]:
    right = {}
    for name, ask in (("subject", subject), ("scene", scene)):
        rng = generator(seed, f"free {name}")
        questions = [ask(prompt, world.nouns, rng) for prompt in prompts]
        found = answers(features, questions, _texts(clip))
        right[name] = [q.truth == label for q, label in zip(questions, found, strict=True)]
    return right
