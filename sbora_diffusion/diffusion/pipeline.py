"""Base + concepts → images: live adapters with weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from sbora_diffusion.core.concept import Concept, check_mergeable, refuse_extras
from sbora_diffusion.core.errors import ConfigError, ConflictError, NonFiniteError, SboraError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.core.folded_set import Weighted, refuse_bad_weight
from sbora_diffusion.diffusion.adapters import activate, eject, inject_concept, set_weight
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.prompts import spelled, tokens_in
from sbora_diffusion.diffusion.tokens import PlaceholderTokens, expanded

StepCallback = Callable[[int, int], None]
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 4.0
AT_ONCE = 4
"""Pictures in a batch of `draw`."""
ENCODED = 2 * 512 * 512
"""Pixels that the autoencoder reads at once."""


class Sampler(Protocol):
    """Prompts and seeds → latents (B, C, H, W); see `draw_latents`, the usual one."""

    def __call__(
        self,
        base: Base,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        guidance: float,
        negative_prompt: str,
        on_step: Callable[[int], None] | None,
        size: tuple[int, int] | None,
    ) -> torch.Tensor: ...


class ConceptPipeline:
    """A base with concepts attached as live adapters.

    Updates are summed in the order of the concepts' digests, so pictures do not depend on the order
    in which concepts came.

    Args:
        base: unadapted; concepts come and go without a trace.
    """

    def __init__(self, base: Base):
        self.base = base
        self.fingerprint = base.fingerprint
        self.concepts: dict[str, Concept] = {}
        self.tokens = PlaceholderTokens(base.pipeline)

    def add(self, concept: Concept, weight: float = 1.0, allow_overlap: bool = False) -> bool:
        """Attach a concept.

        Returns:
            True if it was trained on a rounded copy of this base, which deserves a warning.

        Raises:
            BaseMismatch: it belongs to another base.
            ConflictError: name, token or indices are already in use.
            FormatError: a factor or an embedding does not fit the base, or see `refuse_extras`.
            Nothing was changed.
        """
        refuse_extras(concept)
        rounded = compare(concept.meta.fingerprint, self.fingerprint) == "rounded"
        check_mergeable([*self.concepts.values(), concept], allow_overlap)
        refuse_bad_weight(weight)
        self.tokens.add(concept.embeddings)
        try:
            inject_concept(self.base.pipeline, concept, weight)
        except SboraError:
            self.tokens.remove([entry.token for entry in concept.meta.tokens])
            raise
        self.concepts[concept.meta.name] = concept
        activate(self.base.pipeline, self.order)
        return rounded

    @property
    def order(self) -> list[str]:
        """Names of the attached concepts in the order of their digests."""
        return sorted(self.concepts, key=lambda name: (self.concepts[name].meta.digest, name))

    def switch(self, concepts: Sequence[Weighted], allow_overlap: bool = False) -> list[str]:
        """Make exactly these concepts the attached ones.

        Returns:
            Names of those trained on a rounded copy of this base.

        Raises:
            BaseMismatch, ConflictError, ConfigError: nothing was changed.
            FormatError: a concept does not fit the base; none is attached any more.
        """
        wanted = [concept for concept, _ in concepts]
        relations = {c.meta.name: compare(c.meta.fingerprint, self.fingerprint) for c in wanted}
        check_mergeable(wanted, allow_overlap)
        for concept, weight in concepts:
            refuse_extras(concept)
            refuse_bad_weight(weight)
        for name in [n for n, concept in self.concepts.items() if concept not in wanted]:
            self.remove(name)
        try:
            for concept, weight in concepts:
                if concept.meta.name not in self.concepts:
                    self.add(concept, allow_overlap=allow_overlap)
                self.set_weight(concept.meta.name, weight)
        except BaseException:
            self.switch([])
            raise
        return [name for name, relation in relations.items() if relation == "rounded"]

    def remove(self, name: str) -> None:
        """Detach a concept; the base is as it was before."""
        concept = self._known(name)
        eject(self.base.pipeline, name)
        self.tokens.remove([entry.token for entry in concept.meta.tokens])
        del self.concepts[name]
        activate(self.base.pipeline, self.order)

    def set_weight(self, name: str, weight: float) -> None:
        """Change a concept's weight λ; 0 silences it."""
        self._known(name)
        refuse_bad_weight(weight)
        set_weight(self.base.pipeline, name, weight)

    def unmentioned(self, prompt: str) -> list[str]:
        """Names of concepts with tokens none of which stands in the prompt, in whatever case."""
        mentioned = set(tokens_in(prompt))
        return [
            name
            for name, concept in self.concepts.items()
            if concept.meta.tokens
            and mentioned.isdisjoint(entry.token for entry in concept.meta.tokens)
        ]

    def generate(self, prompt: str, **options) -> list[Image.Image]:
        """Pictures of one prompt; see `generate`."""
        return generate(self.base, prompt, **options)

    def _known(self, name: str) -> Concept:
        if name not in self.concepts:
            raise ConflictError(
                f"no concept {name!r} is attached", f"attached are {sorted(self.concepts)}"
            )
        return self.concepts[name]


def token_vectors(concept: Concept) -> dict[str, torch.Tensor]:
    """Placeholder token → (vectors, dim) of the first text encoder."""
    prefix = "text_encoder."
    return {
        k.removeprefix(prefix): v for k, v in concept.embeddings.items() if k.startswith(prefix)
    }


def generate(
    base: Base,
    prompt: str,
    *,
    seed: int = 0,
    num: int = 1,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    negative_prompt: str = "",
    width: int | None = None,
    height: int | None = None,
    on_step: StepCallback | None = None,
    sampler: Sampler | None = None,
) -> list[Image.Image]:
    """Draw `num` pictures of a prompt; picture k uses seed + k alone, whatever `num` is
    (up to rounding: pictures are drawn four at a time).

    Args:
        width, height: in pixels; each is the base's own by default.
        on_step: called with (steps done, steps in all).
        sampler: `draw_latents` by default; e.g. `regions.Regions`.

    Raises:
        ConfigError: a value is out of its range.
        NonFiniteError: the latents became NaN or infinite.
    """
    if num < 1 or steps < 1:
        raise ConfigError(f"num and steps must be 1 or more, got {num} and {steps}")
    most = base.pipeline.scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(f"the base samples in at most {most} steps, got {steps}", "take fewer")
    seeds, size = [seed + k for k in range(num)], _size(base, width, height)
    prompts = [prompt] * num
    return draw(base, prompts, seeds, steps, guidance, negative_prompt, on_step, sampler, size)


def _size(base: Base, width: int | None, height: int | None) -> tuple[int, int] | None:
    """Height and width, None where neither is given."""
    multiple = 2 * base.pipeline.vae_scale_factor
    for name, side in (("width", width), ("height", height)):
        if side is not None and (side < 1 or side % multiple):
            near = max(multiple, round(side / multiple) * multiple)
            raise ConfigError(
                f"the {name} must be a multiple of {multiple}, got {side}", f"take {near}"
            )
    return (height or base.resolution, width or base.resolution) if width or height else None


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    negative_prompt: str = "",
    on_step: StepCallback | None = None,
    sampler: Sampler | None = None,
    size: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """One picture per prompt and seed, four at a time, decoded and checked.

    Args:
        size: height and width in pixels, the base's own by default.
    """
    pictures: list[Image.Image] = []
    sampler = sampler or draw_latents
    chunks = [slice(k, k + AT_ONCE) for k in range(0, len(prompts), AT_ONCE)]
    for number, rows in enumerate(chunks):

        def report(done: int, number: int = number) -> None:
            if on_step:
                on_step(number * steps + done, len(chunks) * steps)

        latents = sampler(
            base, prompts[rows], seeds[rows], steps, guidance, negative_prompt, report, size
        )
        pictures += decode(base, latents)
    return pictures


def draw_latents(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    negative_prompt: str = "",
    on_step: Callable[[int], None] | None = None,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Latents (B, C, H, W) after sampling; each row depends on its own prompt and seed.

    Args:
        size: height and width of the pictures in pixels, the base's own by default.
    """
    texts = told_texts(base, "prompt", prompts)
    if negative_prompt:  # without one, a base's unconditional half is what it was trained with
        texts |= told_texts(base, "negative_prompt", [negative_prompt] * len(prompts))
    return sample(base, texts, seeds, steps, guidance, on_step, size)


def told_texts(base: Base, name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Texts as diffusers' pipeline takes them under this name, placeholders spelled as the
    vocabulary has them and, where the pipeline does not do it, with all their vectors."""
    pipeline, texts = base.pipeline, [spelled(text) for text in texts]
    if hasattr(pipeline, "maybe_convert_prompt"):
        return {name: texts}
    names = zip((name, f"{name}_2", f"{name}_3"), base.kind.encoders, strict=False)
    readers = {own: getattr(pipeline, encoder.tokenizer) for own, encoder in names}
    return {
        own: [expanded(text, reader) if reader else text for text in texts]
        for own, reader in readers.items()
    }


def hears_nothing(base: Base) -> bool:
    """Whether the unconditional half of guidance is told zeros where there is no negative prompt,
    as Stable Diffusion XL was trained, and not what an empty text says."""
    return bool(base.pipeline.config.get("force_zeros_for_empty_prompt"))


def sample(
    base: Base,
    texts: Mapping[str, Any],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    on_step: Callable[[int], None] | None = None,
    size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Latents (B, C, H, W) after sampling.

    Args:
        texts: the arguments of diffusers' pipeline that say what to draw, plain or encoded.

    Raises:
        NonFiniteError: the latents became NaN or infinite.
    """

    def after_step(_pipeline: object, step: int, _timestep: object, values: dict) -> dict:
        if not values["latents"].isfinite().all():
            raise NonFiniteError(
                f"the picture became NaN or infinite at step {step + 1}",
                "lower the weights of the concepts or the guidance, or use fp32",
            )
        if on_step:
            on_step(step + 1)
        return values

    height, width = size or (None, None)
    with base.recorded.replaying(base.denoiser, base.runtime.graphs):
        drawn = base.pipeline(
            **texts,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="latent",
            callback_on_step_end=after_step,
        ).images
    base.rest()
    return drawn


@torch.no_grad()
def encode(base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [−1, 1] → scaled latents (B, C, h, w), the mean of each."""
    vae = base.pipeline.vae
    batches = pixels.split(max(1, ENCODED // pixels[0, 0].numel()))
    latents = [vae.encode(batch.to(base.device, vae.dtype)).latent_dist.mean for batch in batches]
    base.rest()
    return (torch.cat(latents) - _shift(vae)) * vae.config.scaling_factor


@torch.no_grad()
def decode(base: Base, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, H, W) → pictures."""
    pipeline = base.pipeline
    vae = pipeline.vae
    pixels = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor + _shift(vae))
    base.rest()
    return pipeline.image_processor.postprocess(pixels.sample, output_type="pil")


def _shift(vae: Any) -> float:
    return vae.config.shift_factor or 0.0
