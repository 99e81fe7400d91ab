"""Published conventions for alignment, each a named preset.

They differ in the text that the judge reads, in scale, and in which pairs of pictures are compared,
so figures of different protocols, or of different judges, cannot be compared.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sbora_diffusion.core.errors import ConfigError
from sbora_diffusion.evaluation.metrics import (
    first_reference_alignment,
    image_alignment,
    text_alignment,
)

PLACEHOLDER = re.compile(r"<[a-z0-9_-]{1,62}>")
OPENAI_CLIP = "ViT-B-32:openai"

Pairing = Literal["all-pairs", "first-reference"]
PAIRINGS: Mapping[Pairing, Callable[[Tensor, Tensor], Tensor]] = {
    "all-pairs": image_alignment,
    "first-reference": first_reference_alignment,
}


@dataclass(frozen=True)
class Protocol:
    """How features become figures.

    Attributes:
        source: where the convention is published.
        prefix: what is put before every text.
        tokens: what becomes of placeholder tokens whose class noun is not given: "class-word"
            leaves them, "removed" takes them out.
        text_scale: factor on the cosine of picture and text.
        text_cut: whether a negative cosine of picture and text counts as 0.
        pairings: which references a picture is compared with; each gives a figure of its own.
        clip: the judge of the published figures, as `--clip` takes it.
        dino: whether the published figures have DINO ViT-S/16 beside CLIP.
    """

    name: str
    source: str
    prefix: str = ""
    tokens: Literal["class-word", "removed"] = "class-word"
    text_scale: float = 1.0
    text_cut: bool = False
    pairings: tuple[Pairing, ...] = ("all-pairs",)
    clip: str | None = None
    dino: bool = False

    def plain(self, prompt: str, nouns: Mapping[str, str]) -> str:
        """A prompt as the judge reads it, without the prefix; `nouns`: token → class noun."""
        words = in_plain_words(prompt, nouns)
        return without_tokens(words) if self.tokens == "removed" else words

    def text_alignment(self, images: Tensor, texts: Tensor) -> Tensor:
        """Each picture with its own text, (N, D) and (N, D) → (N,)."""
        cosines = text_alignment(images, texts)
        return self.text_scale * (cosines.clamp(min=0) if self.text_cut else cosines)

    def image_alignments(self, name: str, images: Tensor, references: Tensor) -> dict[str, Tensor]:
        """Each picture with the references, (N, D) and (M, D) → figure → (N,).

        Args:
            name: of the features; the first pairing's figure has it, another one's name follows it.
        """
        names = [name if k == 0 else f"{name}, {p}" for k, p in enumerate(self.pairings)]
        figures = [PAIRINGS[pairing](images, references) for pairing in self.pairings]
        return dict(zip(names, figures, strict=True))

    def published_with(self, clip: str) -> bool:
        """Whether a judge of this name gave the published figures."""
        return self.clip is None or clip == self.clip

    def stated(self) -> str:
        """The convention in one line."""
        cosine = "max(cosine, 0)" if self.text_cut else "cosine"
        text = f"{self.text_scale:g} × {cosine}" if self.text_scale != 1 else cosine
        before = f" behind {self.prefix!r}" if self.prefix else ""
        tokens = {"class-word": "class word for the token", "removed": "token removed"}[self.tokens]
        pairs = " and ".join(pairing.replace("-", " ") for pairing in self.pairings)
        return f"{self.name}: text {text}{before}, {tokens}; image cosine, {pairs}"

    def record(self, clip: str) -> dict[str, Any]:
        """All that decides a figure, ready for JSON."""
        return {
            "name": self.name,
            "prefix": self.prefix,
            "tokens": self.tokens,
            "text_scale": self.text_scale,
            "text_cut_at_0": self.text_cut,
            "pairings": list(self.pairings),
            "published_clip": self.clip,
            "clip_as_published": self.published_with(clip),
            "source": self.source,
        }


RAW_COSINE = Protocol("raw-cosine", "cosines; image alignment as in arXiv 2208.12242, section 4.1")
MIX_OF_SHOW = Protocol(
    "mix-of-show",
    "arXiv 2305.18292; TencentARC/Mix-of-Show, research_branch, scripts/evaluation_scripts",
    prefix="A photo depicts ",
    text_scale=2.5,
    text_cut=True,
    # The paper says all pairs; the published script keeps those with the first reference alone.
    pairings=("all-pairs", "first-reference"),
    clip=OPENAI_CLIP,
)
CUSTOM_DIFFUSION = Protocol(
    "custom-diffusion",
    "arXiv 2212.04488; adobe-research/custom-diffusion, customconcept101/evaluate.py",
    tokens="removed",
    text_scale=2.5,
    text_cut=True,
    clip=OPENAI_CLIP,
    dino=True,
)
PROTOCOLS = {p.name: p for p in (RAW_COSINE, MIX_OF_SHOW, CUSTOM_DIFFUSION)}


def find_protocol(name: str) -> Protocol:
    """The preset of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in PROTOCOLS:
        close = difflib.get_close_matches(name, PROTOCOLS, n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(PROTOCOLS)}"
        raise ConfigError(f"protocol {name!r} is not known", remedy)
    return PROTOCOLS[name]


def in_plain_words(prompt: str, nouns: Mapping[str, str]) -> str:
    """A prompt with the class noun in place of each placeholder token.

    No judge knows the placeholders. "<bear> teddy bear" becomes "teddy bear" too, as in
    Mix-of-Show's captions.
    """
    for token, noun in nouns.items():
        with_its_noun = rf"{re.escape(token)}(?: {re.escape(noun)}\b)?"
        prompt = re.sub(with_its_noun, noun.replace("\\", r"\\"), prompt)
    return prompt


def without_tokens(prompt: str) -> str:
    """A prompt without its placeholder tokens: "a <new1> cat" → "a cat"."""
    return " ".join(PLACEHOLDER.sub(" ", prompt).split())
