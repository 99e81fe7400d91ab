"""What a perfect concept would gain: real pictures of the subjects, judged like drawn ones.

Three steps lead from the bare class word up to there: what the concept gained, what its pictures
lack up to real ones that went through the base's autoencoder, and what the autoencoder costs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from pocket_evaluation.record import mean
from pocket_evaluation.scenes import Subset, World, generator
from sbora_diffusion.alignment import Judges
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.dataset import to_tensor
from sbora_diffusion.diffusion.pipeline import decode, encode
from sbora_diffusion.evaluate import CLASS_WORD, CONCEPT, read_pictures
from sbora_diffusion.evaluation.metrics import image_alignment

KINDS = (CLASS_WORD, CONCEPT)
REAL, DECODED, OTHER = "real", "real_through_autoencoder", "real_others_of_the_class"
SCENES = (
    "beach", "snow", "forest", "space", "kitchen", "room", "meadow", "desert",
    "mountains_at_sunset",
)  # fmt: skip
"""Those of the evaluation's prompts, as far as one subject alone stands in them."""


def ceiling_figures(
    world: World,
    base: Base,
    judges: Judges,
    subjects: Sequence[Subject],
    measured: Mapping[str, Any],
    seed: int,
    number: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The section.

    Args:
        measured: the section `concepts`, for the pictures that the base drew.
        number: real pictures of each kind and subject.
    """
    each = {}
    for subject in subjects:
        name = subject.settings.name
        features = judges.features(read_pictures(subject.images[0].parent))
        found = {
            kind: _alignment(judges, pictures, features)
            for kind, pictures in _pictures(world, base, subject, seed, number).items()
        }
        drawn = {kind: measured["each"][name][kind]["image_alignment"] for kind in KINDS}
        each[name] = drawn | found
        say(f"{name}: {each[name]}")
    means = {
        kind: {judge: mean([e[kind][judge] for e in each.values()]) for judge in features}
        for kind in (*KINDS, OTHER, DECODED, REAL)
    }
    return {
        "concepts": len(each),
        "pictures": number,
        "scenes": SCENES,
        "means": means,
        "gain": {
            kind: {j: round(means[kind][j] - means[CLASS_WORD][j], 4) for j in features}
            for kind in (CONCEPT, DECODED, REAL)
        },
        "each": each,
    }


def _pictures(
    world: World, base: Base, subject: Subject, seed: int, number: int
) -> dict[str, list[Image.Image]]:
    name = subject.settings.name
    sprites = world.bank.sprites
    own = [k for k, s in enumerate(sprites) if s.held_out == name]
    noun = sprites[own[0]].noun
    others = [
        k for k, s in enumerate(sprites)
        if s.held_out is None and s.noun == noun and s.kind == "subject"
    ]  # fmt: skip
    real = _composed(world, own, seed, number)
    latents = encode(base, torch.stack([to_tensor(picture) for picture in real]))
    return {
        REAL: real,
        DECODED: decode(base, latents),
        OTHER: _composed(world, others, seed, number),
    }


def _composed(world: World, rows: Sequence[int], seed: int, number: int) -> list[Image.Image]:
    """One subject without accessories, colours or sizes, in the scenes of the prompts."""
    accessories = [k for k, s in enumerate(world.bank.sprites) if s.kind == "accessory"]
    subset = Subset(world.bank, [*rows, *accessories], by_class=True)
    rng, plans = generator(seed, REAL), []
    while len(plans) < number:
        plan = subset.plan(rng, count=1, worn=False, drawn=False)
        plain = plan.layers[0, 6] < 0 and plan.mentions[0].size is None
        if plain and plan.scene in SCENES:
            plans.append(plan)
    return world.compose(plans)


def _alignment(judges: Judges, pictures: list[Image.Image], references: Any) -> dict[str, float]:
    found = {}
    for judge in (judges.clip, *judges.further):
        each = image_alignment(judge.images(pictures), references[judge.name])
        found[judge.name] = round(each.mean().item(), 4)
    return found
