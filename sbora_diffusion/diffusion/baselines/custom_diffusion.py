"""Custom Diffusion (Kumari et al. 2023, arXiv 2212.04488): the cross-attentions' keys and values
are trained whole, beside one token and pictures of the class; concepts are merged in closed form.

As in its captions ("V* cat") a new word stands before the class noun, which stays what it is, so a
placeholder has the noun's own vectors behind its trained one. Theirs starts from a rare word of
CLIP's, here a random vector of a word's length stands for it.

The merge (Section 3.3) keeps the weights' outputs on ordinary captions near to the base's, and
gives each concept's own on the words that call it:

    W = argmin ‖(W − W0) C_regᵀ‖  subject to  W Cᵀ = V,
    W = W0 + (V − W0 Cᵀ) (D Cᵀ)⁻¹ D,  D = C (C_regᵀ C_reg)⁻¹

with text features as the rows of C and C_reg, and V = (W0 + λ ΔW_i) Cᵢᵀ for the rows Cᵢ of
concept i.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.diffusion.baselines.adapted import Form, update_of
from sbora_diffusion.diffusion.baselines.adapting import AdaptedTraining
from sbora_diffusion.diffusion.baselines.edited import EditedBase, Weighted
from sbora_diffusion.diffusion.baselines.interface import InModel
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.generic import generic_prompts
from sbora_diffusion.diffusion.prompts import spelled
from sbora_diffusion.diffusion.tokens import TrainableTokens

AT_ONCE = 32
"""Prompts in a batch of the text encoder."""
READS_TEXT = re.compile(r"\.attn2\.to_[kv]$")


class FullTraining(AdaptedTraining):
    """Concepts with whole updates ΔW of the cross-attentions' keys and values."""

    form: Form = "full"

    def _placeholders(self, embedding: nn.Embedding, count: int) -> TrainableTokens:
        tokens = ModifierTokens(embedding, count, self._firsts())
        self._randomize(tokens)
        return tokens

    def _adapted_layers(self) -> dict[str, nn.Linear]:
        layers = self.lessons[0].layers
        return {name: layer for name, layer in layers.items() if READS_TEXT.search(name)}

    def _start(self, name: str, layer: nn.Linear) -> Mapping[str, Tensor]:
        shape = (len(self.lessons), layer.out_features, layer.in_features)
        return {"delta": nn.Parameter(torch.zeros(shape, device=self.base.device))}

    def _act(self, layer: nn.Linear, parts: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return y + x @ parts["delta"].mT


class ModifierTokens(TrainableTokens):
    """Placeholders of which some rows alone are trained.

    Args:
        rows: of the placeholders.
        trained: which of them.
    """

    def __init__(self, embedding: nn.Embedding, rows: int, trained: Sequence[int]):
        super().__init__(embedding, rows)
        self._trained = torch.zeros(rows, dtype=torch.bool, device=self.vectors.device)
        self._trained[list(trained)] = True

    def forward(self, ids: Tensor) -> Tensor:
        """As `TrainableTokens`; the other rows get no gradient."""
        states = super().forward(ids)
        trained = self._trained[(ids - self.first).clamp_min(0)]
        return torch.where(trained[..., None], states, states.detach())


class ConstrainedConfig(BaseModel):
    """What the closed form is solved on; as in the authors' code. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: tuple[str, ...] = Field(
        default=("{}", "a photo of {}"),
        min_length=1,
        description="each concept's own; features from its token to the end of the text count",
    )
    captions: int = Field(
        default=200, ge=1, description="ordinary captions, theirs of LAION; here generic"
    )
    seed: int = Field(default=0, ge=0, description="of the generic captions")
    ridge: float = Field(
        default=1e-6,
        ge=0,
        description="share of the captions' mean energy added to each input's; "
        "not the authors', whose captions fill every direction",
    )


def constraining(config: ConstrainedConfig) -> Callable[[Base, Sequence[Weighted]], InModel]:
    """The merge as a function of base and concepts."""
    return partial(constrained, config=config)


@torch.no_grad()
def constrained(base: Base, concepts: Sequence[Weighted], config: ConstrainedConfig) -> InModel:
    """Merge concepts in closed form; only their keys and values may be trained.

    Raises:
        ConfigError: there are more words than a key's input is wide, or ordinary captions do not
            span it.
        BaseMismatch, ConflictError, FormatError, NonFiniteError: they cannot be merged; the base is
            as it was.
    """
    model = EditedBase(base)
    model.check(concepts)
    try:
        model.say([concept for concept, _ in concepts])
        words = [_own_features(base, concept.meta.token, config) for concept, _ in concepts]
        ordinary = features(base, generic_prompts(config.captions, config.seed), 1)
        model.write(
            {
                name: _merged_weight(name, concepts, words, ordinary, model.own[name], config)
                for name in concepts[0][0].layers
            }
        )
    except BaseException:
        model.restore()
        raise
    return InModel(model.restore)


def _merged_weight(
    name: str,
    concepts: Sequence[Weighted],
    words: Sequence[Tensor],
    ordinary: Tensor,
    own: Tensor,
    config: ConstrainedConfig,
) -> Tensor:
    wanted = [
        rows @ (own.double() + weight * update_of(concept.layers[name], own).double()).T
        for (concept, weight), rows in zip(concepts, words, strict=True)
    ]
    return closest(own, ordinary, torch.cat(list(words)), torch.cat(wanted), config.ridge)


def closest(
    own: Tensor, ordinary: Tensor, words: Tensor, wanted: Tensor, ridge: float = 0.0
) -> Tensor:
    """The weight that gives what is wanted on some inputs, and changes least on ordinary ones.

    Args:
        own: W0, (out, in).
        ordinary: C_reg, (N, in), of full column rank.
        words: C, (s, in), distinct rows; at most `in` of them.
        wanted: Vᵀ, (s, out).
        ridge: what counts as ordinary energy everywhere, as a share of the captions' mean.

    Returns:
        W, (out, in), fp64.

    Raises:
        ConfigError: the equations have no solution.
    """
    own, ordinary, words, wanted = (t.double() for t in (own, ordinary, words, wanted))
    if len(words) > own.shape[1]:
        raise ConfigError(
            f"{len(words)} words to hold, a key's input has {own.shape[1]} numbers",
            "merge fewer concepts, or hold them on fewer prompts",
        )
    try:
        energy = ordinary.T @ ordinary
        energy += ridge * energy.trace() / len(energy) * torch.eye(len(energy)).to(energy)
        d = torch.linalg.solve(energy, words.T).T  # (s, in)
        share = torch.linalg.solve(d @ words.T, wanted - words @ own.T)  # (s, out)
    except torch.linalg.LinAlgError as error:
        raise ConfigError(
            "the words or the ordinary captions depend on each other linearly",
            "take more captions, or fewer prompts",
        ) from error
    return own + share.T @ d


def _own_features(base: Base, token: str, config: ConstrainedConfig) -> Tensor:
    rows = []
    for prompt in config.prompts:
        before = prompt.partition("{}")[0].strip()
        skipped = len(token_ids(base, before)) - 2 if before else 0
        rows.append(features(base, [prompt.replace("{}", token)], 1 + skipped))
    return torch.cat(rows)


def features(base: Base, prompts: Sequence[str], first: int) -> Tensor:
    """Text states (words, dim), fp64, from a position to each text's end, that included."""
    found = []
    for at in range(0, len(prompts), AT_ONCE):
        some = [spelled(prompt) for prompt in prompts[at : at + AT_ONCE]]
        states, _ = base.pipeline.encode_prompt(some, base.device, 1, False)
        stops = [len(token_ids(base, prompt)) for prompt in some]
        found += [rows[first:stop] for rows, stop in zip(states, stops, strict=True)]
    return torch.cat(found).double()


def token_ids(base: Base, prompt: str) -> list[int]:
    """A prompt's tokens without padding, with the marks of beginning and end."""
    pipeline = base.pipeline
    text = pipeline.maybe_convert_prompt(spelled(prompt), pipeline.tokenizer)
    longest = pipeline.tokenizer.model_max_length
    return pipeline.tokenizer(text, truncation=True, max_length=longest).input_ids
