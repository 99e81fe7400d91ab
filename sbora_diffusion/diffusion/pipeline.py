"""Base + concepts → images: live adapters with weights."""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image

from sbora_diffusion.core.concept import Concept, check_mergeable
from sbora_diffusion.core.errors import ConfigError, ConflictError, NonFiniteError, SboraError
from sbora_diffusion.core.fingerprint import compare
from sbora_diffusion.diffusion.adapters import activate, eject, inject_concept, set_weight
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.tokens import PlaceholderTokens

StepCallback = Callable[[int, int], None]
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 4.0


class ConceptPipeline:
    """A base with concepts attached as live adapters.

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
            FormatError: a factor or an embedding does not fit the base. Nothing was changed.
        """
        rounded = compare(concept.meta.fingerprint, self.fingerprint) == "rounded"
        check_mergeable([*self.concepts.values(), concept], allow_overlap)
        _refuse_bad_weight(weight)
        self.tokens.add(token_vectors(concept))
        try:
            inject_concept(self.base.pipeline, concept, weight)
        except SboraError:
            self.tokens.remove([entry.token for entry in concept.meta.tokens])
            raise
        self.concepts[concept.meta.name] = concept
        activate(self.base.pipeline, list(self.concepts))
        return rounded

    def remove(self, name: str) -> None:
        """Detach a concept; the base is as it was before."""
        concept = self._known(name)
        eject(self.base.pipeline, name)
        self.tokens.remove([entry.token for entry in concept.meta.tokens])
        del self.concepts[name]
        activate(self.base.pipeline, list(self.concepts))

    def set_weight(self, name: str, weight: float) -> None:
        """Change a concept's weight λ; 0 silences it."""
        self._known(name)
        _refuse_bad_weight(weight)
        set_weight(self.base.pipeline, name, weight)

    def unmentioned(self, prompt: str) -> list[str]:
        """Names of concepts whose token the prompt does not contain."""
        return [
            name
            for name, concept in self.concepts.items()
            if not any(entry.token in prompt for entry in concept.meta.tokens)
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
    """Placeholder token → (vectors, dim) of the (only) text encoder."""
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
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """Draw `num` pictures of a prompt; picture k uses seed + k alone, whatever `num` is
    (up to rounding: pictures are drawn four at a time).

    Args:
        on_step: called with (steps done, steps in all).

    Raises:
        ConfigError: a value is out of its range.
        NonFiniteError: the latents became NaN or infinite.
    """
    if num < 1 or steps < 1:
        raise ConfigError(f"num and steps must be 1 or more, got {num} and {steps}")
    most = base.pipeline.scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(f"the base samples in at most {most} steps, got {steps}")
    seeds = [seed + k for k in range(num)]
    return draw(base, [prompt] * num, seeds, steps, guidance, negative_prompt, on_step)


def draw(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    negative_prompt: str = "",
    on_step: StepCallback | None = None,
) -> list[Image.Image]:
    """One picture per prompt and seed, four at a time, decoded and checked."""
    pictures: list[Image.Image] = []
    chunks = [slice(k, k + 4) for k in range(0, len(prompts), 4)]
    for number, rows in enumerate(chunks):

        def report(done: int, number: int = number) -> None:
            if on_step:
                on_step(number * steps + done, len(chunks) * steps)

        latents = draw_latents(
            base, prompts[rows], seeds[rows], steps, guidance, negative_prompt, report
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
) -> torch.Tensor:
    """Latents (B, C, H, W) after sampling; each row depends on its own prompt and seed."""

    def after_step(_pipeline, step: int, _timestep, values: dict) -> dict:
        if not values["latents"].isfinite().all():
            raise NonFiniteError(
                f"the picture became NaN or infinite at step {step + 1}",
                "lower the weights of the concepts or the guidance, or use fp32",
            )
        if on_step:
            on_step(step + 1)
        return values

    return base.pipeline(
        prompt=list(prompts),
        negative_prompt=[negative_prompt] * len(prompts),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="latent",
        callback_on_step_end=after_step,
    ).images


@torch.no_grad()
def encode(base: Base, pixels: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [−1, 1] → scaled latents (B, C, h, w), the mean of each."""
    vae = base.pipeline.vae
    batches = pixels.split(8)
    latents = [vae.encode(batch.to(vae.device, vae.dtype)).latent_dist.mean for batch in batches]
    return torch.cat(latents) * vae.config.scaling_factor


@torch.no_grad()
def decode(base: Base, latents: torch.Tensor) -> list[Image.Image]:
    """Latents (B, C, H, W) → pictures."""
    pipeline = base.pipeline
    pixels = pipeline.vae.decode(
        latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor
    )
    return pipeline.image_processor.postprocess(pixels.sample, output_type="pil")


def _refuse_bad_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise ConfigError(f"a concept's weight must be a finite number, got {weight}")
