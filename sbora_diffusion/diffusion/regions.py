"""Several concepts in one picture, each in its region."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from sbora_diffusion.core.concept import Concept
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, hears_nothing, sample
from sbora_diffusion.diffusion.prompts import spelled, tokens_in, with_nouns
from sbora_diffusion.diffusion.region_attention import BACKGROUND, RegionGate, region_attention
from sbora_diffusion.diffusion.region_maps import attention_masks

SOFT_EDGE = 1 / 16
"""Width of a region's edge, as a share of the picture: one token of a 16×16 level."""
ENCODED_TEXTS = (
    "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)  # fmt: skip
"""What diffusers' `encode_prompt` gives, as arguments of its pipelines."""


@dataclass(frozen=True)
class Box:
    """A part of the picture, from its left upper to its right lower corner, in 0 to 1.

    Raises:
        ConfigError: it is empty or reaches beyond the picture.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if not (0 <= self.x0 < self.x1 <= 1 and 0 <= self.y0 < self.y1 <= 1):
            raise ConfigError(
                f"a region must have 0 ≤ x0 < x1 ≤ 1 and 0 ≤ y0 < y1 ≤ 1, got "
                f"{','.join(f'{value:g}' for value in astuple(self))}",
                "e.g. 0,0,0.5,1 for the left half",
            )

    def mask(self, height: int, width: int) -> Tensor:
        """(height, width): 1 inside, 0 outside, soft edges between but at the picture's border."""
        return _ramp(self.y0, self.y1, height)[:, None] * _ramp(self.x0, self.x1, width)


def parse_region(text: str) -> tuple[str, Box]:
    """`NAME=x0,y0,x1,y1` → the concept's name and its box.

    Raises:
        ConfigError: it is written in another way, or see `Box`.
    """
    name, _, numbers = text.partition("=")
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers.split(","))
    except ValueError:
        raise ConfigError(
            f"a region must be NAME=x0,y0,x1,y1, got {text!r}", "e.g. fox=0,0,0.5,1"
        ) from None
    return name, Box(x0, y0, x1, y1)


def parse_regions(texts: Iterable[str]) -> dict[str, Box]:
    """Concept's name → its box, of texts that `parse_region` reads.

    Raises:
        ConfigError: one concept has two, or see `parse_region`.
    """
    boxes: dict[str, Box] = {}
    for name, box in map(parse_region, texts):
        if name in boxes:
            raise ConfigError(f"concept {name!r} has two regions", "give it one")
        boxes[name] = box
    return boxes


def box_masks(boxes: Sequence[Box], height: int, width: int) -> Tensor:
    """(1, boxes, height, width); where boxes overlap they share, 1 in sum."""
    masks = torch.stack([box.mask(height, width) for box in boxes])
    return (masks / masks.sum(0).clamp_min(1.0))[None]


class Regions:
    """A sampler that confines each attached concept to its region.

    The prompt is encoded once per concept, with that concept's text adapter and token alone, and
    once with class nouns alone for what lies outside all regions. Cross-attention is computed for
    each of these with the concept's own adapters and blended by soft masks; in self-attention each
    latent token gets a concept's update times its mask.

    In a concept's own text its token also stands in the place of the other tokens. With the others'
    class nouns the text would say which subject is on which side, and a concept whose box lies on
    the other side would be drawn as the other subject.

    The unconditional branch of guidance goes the same way, with the negative prompt in the place of
    the prompt. Guidance extrapolates from one branch to the other: what a concept adds whatever the
    prompt says cancels in their difference, where a frozen unconditional branch would multiply it
    by the guidance scale. It is also what drawing without regions does, hence one concept in the
    whole picture gives the same latents.

    Where a text also has one pooled vector for the whole picture, as in Stable Diffusion XL, that
    is the prompt's with all concepts, as in drawing without regions.

    Args:
        pipeline: with the concepts attached.
        boxes: concept's name → its box, for every attached concept; without, the regions are
            derived for each picture from the base's own cross-attention, see
            `region_maps.attention_masks`.

    Raises:
        ConfigError: a name is not attached, an attached concept has no region, or the base has no
            cross-attention.
    """

    def __init__(self, pipeline: ConceptPipeline, boxes: Mapping[str, Box] | None = None):
        if pipeline.base.kind.denoiser != "unet":
            raise ConfigError(
                f"regions cannot work with a base of family {pipeline.base.family}, which attends "
                "to texts and picture together",
                "draw without regions, which tell concepts apart by their tokens alone",
            )
        self.pipeline, self.boxes = pipeline, boxes
        if boxes is not None:
            _check_names(pipeline, boxes)

    def __call__(
        self,
        base: Base,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        negative_prompt: str = "",
        on_step: Callable[[int], None] | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """See `draw_latents`.

        Raises:
            ConfigError: a prompt lacks the token of a concept.
        """
        assert base is self.pipeline.base
        concepts = [self.pipeline.concepts[name] for name in self.pipeline.order]
        prompts = [spelled(prompt) for prompt in prompts]
        negatives = [spelled(negative_prompt)] * len(prompts)
        _check_prompts(prompts, concepts)
        masks = self._masks(concepts, prompts, seeds, steps, guidance, negatives[0], size)
        gate = RegionGate(self.pipeline.order, masks)
        pooled = self._pooled(prompts, negatives, guidance > 1)
        with region_attention(base.pipeline, gate):
            texts = self._encoded(gate, prompts, negatives, guidance > 1) | pooled
            return sample(base, texts, seeds, steps, guidance, on_step, size)

    def _masks(
        self,
        concepts: Sequence[Concept],
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        negative_prompt: str,
        size: tuple[int, int] | None,
    ) -> Tensor:
        base = self.pipeline.base
        if self.boxes is not None:
            height, width = size or (base.resolution, base.resolution)
            factor = base.pipeline.vae_scale_factor
            boxes = [self.boxes[concept.meta.name] for concept in concepts]
            return box_masks(boxes, height // factor, width // factor).to(base.device)
        nouns = _nouns(concepts)
        return attention_masks(
            base,
            [with_nouns(prompt, nouns) for prompt in prompts],
            [[entry.token for entry in concept.meta.tokens] for concept in concepts],
            seeds,
            steps,
            guidance,
            with_nouns(negative_prompt, nouns).text,
            size,
        )

    def _own_text(self, stream: str, prompt: str) -> str:
        """The prompt as a stream reads it, see the class."""
        if stream == BACKGROUND:
            return with_nouns(prompt, _nouns(self.pipeline.concepts.values())).text
        own = self.pipeline.concepts[stream].meta.tokens[0].token
        return with_nouns(prompt, dict.fromkeys(self._others(stream), own)).text

    def _others(self, stream: str) -> dict[str, str]:
        """Token → class noun of all concepts but the stream's."""
        return _nouns([c for name, c in self.pipeline.concepts.items() if name != stream])

    @torch.no_grad()
    def _encoded(
        self, gate: RegionGate, prompts: Sequence[str], negatives: Sequence[str], guided: bool
    ) -> dict[str, Tensor]:
        """The texts of all streams side by side, as `RegionCrossAttention` wants them."""
        streams = []
        for stream in gate.streams:
            own = [self._own_text(stream, prompt) for prompt in prompts]
            other = [with_nouns(text, self._others(stream)).text for text in negatives]
            with gate.only(stream):
                streams.append(encoded_texts(self.pipeline.base, own, other, guided))
        names = [name for name in streams[0] if "pooled" not in name]
        return {name: torch.cat([texts[name] for texts in streams], 1) for name in names}

    @torch.no_grad()
    def _pooled(
        self, prompts: Sequence[str], negatives: Sequence[str], guided: bool
    ) -> dict[str, Tensor]:
        """What the denoiser is told of the texts as a whole, if it is told anything."""
        base = self.pipeline.base
        if len(base.kind.encoders) == 1:
            return {}
        texts = encoded_texts(base, prompts, negatives, guided)
        return {name: vectors for name, vectors in texts.items() if "pooled" in name}


def encoded_texts(
    base: Base, prompts: Sequence[str], negatives: Sequence[str], guided: bool
) -> dict[str, Tensor]:
    """What a UNet is told of texts, as its pipeline takes it in their place; with guidance of the
    negative ones too, which all are "" if there are none.

    Args:
        prompts, negatives: as many, placeholders spelled as the vocabulary has them.
    """
    silent = hears_nothing(base) and not any(negatives)
    encoded = base.pipeline.encode_prompt(
        list(prompts),
        device=base.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=guided,
        negative_prompt=None if silent else list(negatives),
    )
    named = zip(ENCODED_TEXTS, encoded, strict=False)  # nothing is pooled by one encoder alone
    return {name: tensor for name, tensor in named if tensor is not None}


def region_sampler(
    pipeline: ConceptPipeline, boxes: Mapping[str, Box]
) -> tuple[Regions, dict[str, Any]]:
    """A sampler for these boxes, for derived ones if there are none, and what its pictures note."""
    if not boxes:
        return Regions(pipeline), {"regions": "auto"}
    return Regions(pipeline, boxes), {"regions": {n: astuple(b) for n, b in boxes.items()}}


def _nouns(concepts: Iterable[Concept]) -> dict[str, str]:
    return {
        entry.token: entry.initializer or concept.meta.class_noun
        for concept in concepts
        for entry in concept.meta.tokens
    }


def _check_names(pipeline: ConceptPipeline, boxes: Mapping[str, Box]) -> None:
    attached = sorted(pipeline.concepts)
    for name in boxes:
        if name not in attached:
            raise ConfigError(
                f"region {name!r} is not the name of an active concept", f"active are {attached}"
            )
    for name in attached:
        if name not in boxes:
            raise ConfigError(
                f"concept {name!r} has no region, the others have",
                f"give it one, e.g. {name}=0,0,1,1 for the whole picture, or leave it out",
            )


def _check_prompts(prompts: Sequence[str], concepts: Sequence[Concept]) -> None:
    for prompt in prompts:
        mentioned = set(tokens_in(prompt))
        for concept in concepts:
            tokens = [entry.token for entry in concept.meta.tokens]
            if mentioned.isdisjoint(tokens):
                raise ConfigError(
                    f"concept {concept.meta.name!r} has a region, but the prompt does not mention "
                    f"{' or '.join(tokens) or 'it'}",
                    "write its token where it shall appear",
                )


def _ramp(start: float, stop: float, count: int) -> Tensor:
    """(count,): 1 between start and stop, 0 outside, sloping over `SOFT_EDGE` around each."""
    centres = (torch.arange(count) + 0.5) / count
    up = (centres - start) / SOFT_EDGE + 0.5 if start > 0 else torch.ones(count)
    down = (stop - centres) / SOFT_EDGE + 0.5 if stop < 1 else torch.ones(count)
    return torch.minimum(up, down).clamp(0, 1)
