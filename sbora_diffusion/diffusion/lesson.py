"""What one concept is learned from, and the concept that comes out: training without a model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from sbora_diffusion.core.allocation import check_capacity
from sbora_diffusion.core.concept import Concept, ConceptMeta, LayerFactor, TokenMeta, sealed
from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.bases import DTYPES, Base
from sbora_diffusion.diffusion.buckets import UNIT, Size
from sbora_diffusion.diffusion.concepts import Subject
from sbora_diffusion.diffusion.config import TrainConfig
from sbora_diffusion.diffusion.dataset import Example, load_examples, to_tensor
from sbora_diffusion.diffusion.families import Encoder
from sbora_diffusion.diffusion.noise import Draw, Objective
from sbora_diffusion.diffusion.pipeline import draw, encode
from sbora_diffusion.diffusion.preservation import Preserved, preserved_examples
from sbora_diffusion.diffusion.targets import target_layers
from sbora_diffusion.diffusion.tokens import FIRST, word_vectors

USUAL_VECTORS, MOST_VECTORS = 4, 8
"""Of a placeholder, where the recipe leaves it open; results/recipes.json has what more give."""


@dataclass(frozen=True, eq=False)
class Stream:
    """Batches of encoded pictures of one size, drawn by one generator.

    Attributes:
        latents: (N, C, H, W), scaled, on the CPU.
        captions: those of each picture, one of which is drawn.
        masks: (N, 1, H, W), how much of the latents' places counts, in the mean 1; all without.
    """

    latents: Tensor
    captions: list[tuple[str, ...]]
    generator: Generator
    masks: Tensor | None = None

    @property
    def pictures(self) -> int:
        return len(self.captions)

    def draw(self, objective: Objective, batch_size: int) -> tuple[Draw, list[str]]:
        """The next batch and its captions."""
        rows = torch.randint(len(self.latents), (batch_size,), generator=self.generator)
        words = [_choose(self.captions[row], self.generator) for row in rows.tolist()]
        drawn = objective.draw(self.latents[rows], self.generator)
        if self.masks is not None:
            drawn = drawn._replace(weight=drawn.weight.view(-1, 1, 1, 1) * self.masks[rows])
        return drawn, words


@dataclass(frozen=True, eq=False)
class Mindful:
    """A stream whose batches have some rows more: what the frozen base makes of generic prompts.

    Attributes:
        rows: how many.
        share: of their loss in the sum with the others' mean.
    """

    own: Stream
    preserved: Preserved
    rows: int
    share: float

    @property
    def pictures(self) -> int:
        return self.own.pictures

    @property
    def generator(self) -> Generator:
        return self.own.generator

    def draw(self, objective: Objective, batch_size: int) -> tuple[Draw, list[str]]:
        """The next batch, of batch_size + rows; its weighted mean is the sum of both losses."""
        own, words = self.own.draw(objective, batch_size)
        others, captions = self.preserved.draw(self.rows, self.generator)
        total = batch_size + self.rows
        own = own._replace(weight=own.weight * total / batch_size)
        weight = others.weight * self.share * total / self.rows
        if own.weight.dim() > 1:
            weight = weight.view(-1, 1, 1, 1).expand(-1, *own.weight.shape[1:])
        others = others._replace(weight=weight)
        return Draw(*map(torch.cat, zip(own, others, strict=True))), words + captions


@dataclass(frozen=True, eq=False)
class Buckets:
    """Batches of pictures of several sizes, each batch of one. How often it is a size's turn goes
    by its pictures, so that all are seen as often; a few pictures fill a batch by repetition.

    Attributes:
        streams: one for each size, which draw from one generator.
    """

    streams: list[Stream | Mindful]

    @property
    def generator(self) -> Generator:
        return self.streams[0].generator

    def draw(self, objective: Objective, batch_size: int) -> tuple[Draw, list[str]]:
        """The next batch and its captions."""
        shares = torch.tensor([float(stream.pictures) for stream in self.streams])
        chosen = int(torch.multinomial(shares, 1, generator=self.generator))
        return self.streams[chosen].draw(objective, batch_size)


Batches = Stream | Mindful | Buckets


class Lesson:
    """One subject, its recipe and its range.

    Args:
        base: an unadapted base.
        subject: settings and reference images.
        config: the recipe.
        start: first entry of the concept's range, e.g. slot · rank.

    Attributes:
        layers: canonical name → adapted layer of the base.
        widths: canonical name → how many indices the layer has.
        initial: text encoder → (vectors, dim), what the placeholder starts from there.
        prior: pictures of the bare class noun.
        preserved: size of pictures → what the base makes of generic prompts in that size.

    Raises:
        CapacityError, DataError, ConfigError: the base is as it was.
    """

    def __init__(self, base: Base, subject: Subject, config: TrainConfig, start: int):
        self.base, self.subject, self.config, self.start = base, subject, config, start
        self.fingerprint = base.fingerprint
        unit = UNIT * base.pipeline.vae_scale_factor if config.aspect_buckets else None
        self.examples = load_examples(
            subject, config.resolution or base.resolution, config.copies, config.flip, config.seed,
            config.masked_loss, unit,
        )  # fmt: skip
        self.initial = {
            encoder.model: self._initial(encoder) for encoder in base.kind.present(base.pipeline)
        }
        self.layers = target_layers(base.pipeline, config.targets)
        self.widths = {n: layer_width(layer, config.variant) for n, layer in self.layers.items()}
        check_capacity(self.widths, start, start + config.rank)
        self.prior = self._prior_examples() if config.prior_weight else []
        sizes = _by_size(self.examples) if config.preservation else {}
        self.preserved = {size: preserved_examples(base, size) for size in sizes}

    def _initial(self, encoder: Encoder) -> Tensor:
        noun = self.subject.settings.class_noun
        if not encoder.trained:
            return word_vectors(self.base.pipeline, noun, encoder.model)
        return initial_vectors(self.base, noun, self.config.vectors, encoder.model)

    def streams(self) -> list[Batches]:
        """The subject's own batches and, where the recipe asks for them, those of its class; all
        draw from one generator."""
        generator = Generator().manual_seed(self.config.seed)
        sizes = _by_size(self.examples).items()
        buckets = [self._own(size, examples, generator) for size, examples in sizes]
        own = buckets[0] if len(buckets) == 1 else Buckets(buckets)
        return [own, self._stream(self.prior, generator)] if self.prior else [own]

    def _own(self, size: Size, examples: list[Example], generator: Generator) -> Stream | Mindful:
        config, own = self.config, self._stream(examples, generator)
        if not self.preserved:
            return own
        return Mindful(own, self.preserved[size], config.preservation_rows, config.preservation)

    def _stream(self, examples: list[Example], generator: Generator) -> Stream:
        latents = encode(self.base, torch.stack([example.pixels for example in examples]))
        captions = [example.captions for example in examples]
        return Stream(latents.cpu(), captions, generator, _masks(examples, latents))

    def _prior_examples(self) -> list[Example]:
        """Pictures of the bare class noun, drawn by the frozen base."""
        prompt = f"a photo of a {self.subject.settings.class_noun}"
        count, seed = self.config.prior_images, self.config.seed
        pictures = draw(self.base, [prompt] * count, [seed + k for k in range(count)])
        return [Example(to_tensor(picture), (prompt,)) for picture in pictures]

    def concept(self, layers: Mapping[str, LayerFactor], vectors: Mapping[str, Tensor]) -> Concept:
        """The concept of these factors, on the CPU and of the dtype that is saved.

        Args:
            vectors: text encoder → (vectors, dim) of the placeholder; where it is missing, what it
                started from.
        """
        token, dtype = self.subject.settings.token, DTYPES[self.config.save_dtype]
        embeddings = {
            f"{encoder}.{token}": rows.detach().to("cpu", dtype, copy=True)
            for encoder, rows in {**self.initial, **vectors}.items()
        }
        return sealed(Concept(self._meta(), dict(layers), embeddings))

    @property
    def captions(self) -> list[str]:
        """All texts of its batches."""
        examples = [*self.examples, *self.prior]
        own = [caption for example in examples for caption in example.captions]
        generic = [caption for kept in self.preserved.values() for caption in kept.captions]
        return [*own, *generic]

    def _meta(self) -> ConceptMeta:
        config, settings, start = self.config, self.subject.settings, self.start
        rank = config.rank
        return ConceptMeta(
            name=settings.name,
            variant=config.variant,
            rank=rank,
            alpha=config.resolved_alpha,
            slot=start // rank if start % rank == 0 else None,
            start=start,
            stop=start + rank,
            allocation_seed=config.allocation_seed,
            family=self.base.family,
            base_name=self.base.public_name,
            fingerprint={name: self.fingerprint[name] for name in self.layers},
            widths=self.widths,
            class_noun=settings.class_noun,
            tokens=(TokenMeta(token=settings.token, initializer=settings.class_noun),),
            training=config.model_dump(mode="json"),
        )


def _by_size(examples: list[Example]) -> dict[Size, list[Example]]:
    found: dict[Size, list[Example]] = {}
    for example in examples:
        height, width = example.pixels.shape[-2:]
        found.setdefault((height, width), []).append(example)
    return found


def _masks(examples: list[Example], latents: Tensor) -> Tensor | None:
    """Those of the examples, as large as their latents and in the mean 1."""
    masks = [example.mask for example in examples if example.mask is not None]
    if not masks:
        return None
    small = functional.interpolate(torch.stack(masks), size=latents.shape[-2:], mode="area")
    return small / small.mean(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)


def layer_width(layer: nn.Linear, variant: str) -> int:
    """The dimension that indices are drawn from: inputs for FA, outputs for FB."""
    return layer.in_features if variant == "fa" else layer.out_features


def initial_vectors(base: Base, class_noun: str, count: int | None, encoder: str = FIRST) -> Tensor:
    """The class noun's own embeddings, the last one repeated, or cut to `count`."""
    vectors = word_vectors(base.pipeline, class_noun, encoder)
    if not len(vectors):
        raise ConfigError(f"class noun {class_noun!r} has no tokens", "use a plain English noun")
    if count is None:
        count = min(max(USUAL_VECTORS, len(vectors)), MOST_VECTORS)
    return torch.cat([vectors, vectors[-1:].expand(max(0, count - len(vectors)), -1)])[:count]


def _choose(options: tuple[str, ...], generator: Generator) -> str:
    return options[int(torch.randint(len(options), (1,), generator=generator))]
