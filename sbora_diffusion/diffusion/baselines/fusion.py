"""Gradient fusion, the merge of Mix-of-Show (Gu et al. 2023, arXiv 2305.18292, Section 3.3).

Each layer gets the weight that gives, on the inputs X_i of every concept's own prompts, what the
concept's own weight gives: argmin Σ ‖(W − W_i) X_i‖², by L-BFGS from the base's weight, W_i being
W0 + λ ΔW_i. First the text encoder's layers, then the cross-attentions' keys and values, then the
others, each on what the layers before, fused already, give; as the authors' code does it. The
objective needs of X_i no more than the second moment.

Nothing in the objective holds what X_i hardly has, so a weight that is fitted to the end may be far
off on other prompts: on the pocket base that of their settings is, in the text encoder and in
self-attention, and `STOPPED_EARLY`, few iterations on more pictures, is not.
"""

from collections.abc import Callable, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from sbora_diffusion.diffusion.activations import watched
from sbora_diffusion.diffusion.baselines.adapted import Adapted, update_of
from sbora_diffusion.diffusion.baselines.custom_diffusion import READS_TEXT, token_ids
from sbora_diffusion.diffusion.baselines.edited import EditedBase, Weighted, summed
from sbora_diffusion.diffusion.baselines.interface import InModel
from sbora_diffusion.diffusion.baselines.layerwise import cross_attentions
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import draw_latents
from sbora_diffusion.diffusion.tokens import vector_names


class FusionConfig(BaseModel):
    """Values as in the authors' code. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = Field(
        default=("photo of a {}", "{}"), min_length=1, description="of the layers that read text"
    )
    drawn: str = Field(
        default="photo of a {}", description="prompt of the layers that read the picture"
    )
    pictures: int = Field(default=1, ge=1, le=1000, description="so many are drawn at once")
    steps: int = Field(default=20, ge=1, description="of drawing, without guidance; all count")
    text_iterations: int = Field(default=500, ge=1, description="text encoder, keys and values")
    spatial_iterations: int = Field(default=50, ge=1, description="the other layers")
    history: int = Field(default=25, ge=1, description="of L-BFGS, with strong Wolfe line search")
    tolerance: float = Field(default=1e-16, ge=0, description="of gradient and change")
    seed: int = Field(default=0, ge=0, lt=1 << 62, description="picture k uses seed + k")


STOPPED_EARLY = FusionConfig(pictures=8, text_iterations=10, spatial_iterations=10)
"""Not the authors': see above."""
SMALL = 1 << 19
"""Up to so many numbers a weight is fitted on the CPU: of thousands of small operations, each with
an answer that the next one needs, a GPU costs more to ask than the work."""

Moments = dict[str, "SecondMoment"]
"""Layer → the moment of its inputs."""


class SecondMoment:
    """Σ x xᵀ of some inputs, (in, in), fp64, and their number."""

    def __init__(self, width: int, device: torch.device):
        self.products = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Count inputs (..., in)."""
        rows = x.detach().reshape(-1, x.shape[-1]).double()
        self.products += rows.T @ rows
        self.count += len(rows)


def fusing(config: FusionConfig) -> Callable[[Base, Sequence[Weighted]], InModel]:
    """The merge as a function of base and concepts.

    It raises BaseMismatch, ConfigError, ConflictError, FormatError or NonFiniteError if they cannot
    be merged; the base is as it was then.
    """

    def into(base: Base, concepts: Sequence[Weighted]) -> InModel:
        model = EditedBase(base)
        model.check(concepts)
        try:
            model.say([concept for concept, _ in concepts])
            _Fusion(model, concepts, config).run()
        except BaseException:
            model.restore()
            raise
        return InModel(model.restore)

    return into


class _Fusion:
    """One merge. The layers of a stage are measured and fused together; inside a stage a concept's
    own layers are in place while it is measured."""

    def __init__(self, model: EditedBase, concepts: Sequence[Weighted], config: FusionConfig):
        self.model, self.concepts, self.config = model, concepts, config
        self.pipeline = model.base.pipeline
        self.fused: dict[str, Tensor] = {}

    def run(self) -> None:
        names = list(dict.fromkeys(name for c, _ in self.concepts for name in c.layers))
        text = [name for name in names if name.startswith("text_encoder.")]
        keys = [name for name in names if READS_TEXT.search(name)]
        spatial = [name for name in names if name not in {*text, *keys}]
        self._stage(text, self._read, self.config.text_iterations)
        self._stage(keys, self._hear, self.config.text_iterations)
        self._stage(spatial, self._draw, self.config.spatial_iterations)

    def _stage(
        self,
        names: Sequence[str],
        measure: Callable[[Adapted, Moments], None],
        iterations: int,
    ) -> None:
        measured = []
        for concept, weight in self.concepts:
            own = summed([(concept, weight)], self.model.own, names)
            self.model.write({**self.fused, **own})
            layers = {name: self.model.layers[name] for name in names if name in own}
            found = {n: SecondMoment(x.in_features, x.weight.device) for n, x in layers.items()}
            with torch.no_grad():
                measure(concept, found)
            measured.append(found)
        for name in names:
            self.fused[name] = self._fused(name, measured, iterations)
        self.model.write(self.fused)

    def _fused(self, name: str, measured: Sequence[Moments], iterations: int) -> Tensor:
        own, here = self.model.own[name], [k for k, found in enumerate(measured) if name in found]
        concepts = [self.concepts[k] for k in here]
        updates = [weight * update_of(concept.layers[name], own) for concept, weight in concepts]
        moments = [measured[k][name] for k in here]
        update = fused_update(updates, moments, iterations, self.config)
        return (own + update.to(own.device)).float()

    def _read(self, concept: Adapted, found: Moments) -> None:
        """The text encoder's layers, on all words."""
        with watched({n: self.model.layers[n] for n in found}, lambda n, x: found[n].add(x)):
            for prompt in self.config.prompts:
                self._states(prompt.replace("{}", concept.meta.token))

    def _hear(self, concept: Adapted, found: Moments) -> None:
        """Keys and values, on the placeholder's states and the end's, each layer its own."""
        order = list(cross_attentions(self.pipeline))
        count = len(order) if concept.vectors.dim() == 3 else 1
        for prompt in self.config.prompts:
            states, words = self._states(prompt.replace("{}", concept.meta.token))
            parts = states[self._called(concept, words)].chunk(count, -1)
            for name, moment in found.items():
                path = name.removeprefix("unet.").rpartition(".")[0]
                moment.add(parts[order.index(path) % count])

    def _draw(self, concept: Adapted, found: Moments) -> None:
        """The other layers, while pictures are drawn."""
        base, config = self.model.base, self.config
        prompts = [config.drawn.replace("{}", concept.meta.token)] * config.pictures
        seeds = range(config.seed, config.seed + config.pictures)
        with watched({n: self.model.layers[n] for n in found}, lambda n, x: found[n].add(x)):
            draw_latents(base, prompts, seeds, config.steps, guidance=1.0)

    def _states(self, prompt: str) -> tuple[Tensor, list[int]]:
        """Text states (words, layers · dim) of a prompt without padding, and its tokens."""
        words = token_ids(self.model.base, prompt)
        states = self.pipeline.text_encoder(torch.tensor([words], device=self.model.base.device))
        return states[0][0], words

    def _called(self, concept: Adapted, words: Sequence[int]) -> list[int]:
        """Where the placeholder and the text's end stand."""
        tokenizer = self.pipeline.tokenizer
        names = vector_names(concept.meta.token, len(concept.vectors))
        wanted = {*tokenizer.convert_tokens_to_ids(names), tokenizer.eos_token_id}
        return [k for k, word in enumerate(words) if word in wanted]


def fused_update(
    updates: Sequence[Tensor],
    moments: Sequence[SecondMoment],
    iterations: int,
    config: FusionConfig,
) -> Tensor:
    """D = argmin Σ ‖(D − λ ΔW_i) X_i‖² by L-BFGS from zero; the best that it has seen, (out, in).

    The mean over all inputs and outputs is what is minimised, which sets the first step's length.
    It is computed as tr(D P Dᵀ) − 2 tr(D Rᵀ) + constant, in fp64: so a step costs the same for any
    number of concepts, and the difference of large numbers keeps its digits.

    Args:
        updates: λ ΔW_i, (out, in).
        moments: of X_i.

    Returns:
        fp64, small ones on the CPU.
    """
    size = sum(moment.count for moment in moments) * len(updates[0])
    place = torch.device("cpu") if updates[0].numel() <= SMALL else updates[0].device
    pairs = [
        (u.to(place).double(), m.products.to(place) / size)
        for u, m in zip(updates, moments, strict=True)
    ]
    products = torch.stack([p for _, p in pairs]).sum(0)
    wanted = torch.stack([u @ p for u, p in pairs]).sum(0)
    constant = sum(((u @ p) * u).sum() for u, p in pairs)
    update = torch.zeros_like(wanted, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [update], lr=1, max_iter=iterations, history_size=config.history,
        line_search_fn="strong_wolfe", tolerance_grad=config.tolerance,
        tolerance_change=config.tolerance,
    )  # fmt: skip
    best: tuple[float, Tensor] = (float("inf"), update.detach().clone())

    def closure() -> float:
        nonlocal best
        now = update.detach()
        given = now @ products
        loss = ((given - 2 * wanted) * now).sum().add(constant).item()
        update.grad = 2 * (given - wanted)
        if loss < best[0]:
            best = loss, now.clone()
        return loss

    optimizer.step(closure)
    return best[1]
