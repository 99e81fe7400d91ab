"""Draw pairs: the same prompts and seeds in each condition, the four pictures of a pair at once."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pair_study.lora import Lora, LoraPipeline
from pair_study.plan import LEFT, RIGHT, Pair, Planned, pictures_of, tokens_of
from pair_study.training import Recipe
from sbora_diffusion.core.concept import Concept
from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.pipeline import ConceptPipeline, decode, draw_latents
from sbora_diffusion.diffusion.prompts import tokens_in
from sbora_diffusion.diffusion.regions import Box, Regions, box_masks

QUALITY = 92


class SidedRegions(Regions):
    """Regions that each picture has for itself: what its prompt names first is on the left."""

    def __init__(self, pipeline: ConceptPipeline | LoraPipeline):
        super().__init__(pipeline, dict.fromkeys(pipeline.concepts, LEFT))

    def _masks(
        self,
        concepts: Sequence[Concept | Lora],
        prompts: Sequence[str],
        _seeds: Sequence[int],
        _steps: int,
        _guidance: float,
        _negative_prompt: str,
        size: tuple[int, int] | None,
    ) -> Tensor:
        base = self.pipeline.base
        pixels, factor = size or (base.resolution, base.resolution), base.pipeline.vae_scale_factor
        height, width = (side // factor for side in pixels)
        rows = [box_masks(_boxes(concepts, prompt), height, width) for prompt in prompts]
        return torch.cat(rows).to(base.device)


@dataclass
class PairDrawer:
    """One condition on one base.

    Attributes:
        files: folder of the trained concepts, see `Recipe.file`.
        pairs: all of the study's.
    """

    base: Base
    recipe: Recipe
    files: Path
    regions: bool
    pairs: Sequence[Pair]
    steps: int
    guidance: float

    @property
    def condition(self) -> str:
        return f"{self.recipe.method}-regions" if self.regions else self.recipe.method

    @cached_property
    def pipeline(self) -> ConceptPipeline | LoraPipeline:
        return (ConceptPipeline if self.recipe.method == "sbora" else LoraPipeline)(self.base)

    @cached_property
    def _trained(self) -> dict[str, Concept | Lora]:
        return {}

    def draw(self, pair: Pair) -> tuple[list[Planned], list[Image.Image]]:
        """The pictures of a pair; its concepts stay attached until the next."""
        planned = pictures_of(self.pairs, pair, tokens_of(self.recipe.subjects))
        self.attach(pair)
        latents = (SidedRegions(self.pipeline) if self.regions else draw_latents)(
            self.base,
            [picture.prompt for picture in planned],
            [picture.seed for picture in planned],
            self.steps,
            self.guidance,
        )
        return planned, decode(self.base, latents)

    def attach(self, names: Sequence[str]) -> None:
        """Make exactly these concepts the active ones; none takes all of them out."""
        for name in names:
            if name not in self._trained:
                self._trained[name] = self.recipe.read(self.files, name)
        found = [self._trained[name] for name in names]
        sbora = isinstance(self.pipeline, ConceptPipeline)
        self.pipeline.switch([(concept, 1.0) for concept in found] if sbora else found)

    def keep(self, pair: Pair, out: Path) -> None:
        """Draw a pair and write the pictures, then the JSON that names them."""
        folder, stem = out / self.condition, "+".join(pair)
        folder.mkdir(parents=True, exist_ok=True)
        planned, pictures = self.draw(pair)
        entries = []
        for number, (plan, picture) in enumerate(zip(planned, pictures, strict=True)):
            file = f"{stem}-{number}.webp"
            picture.save(folder / file, quality=QUALITY)
            entries.append({"file": file, **plan.record()})
        record = {"pair": pair, **self.settings(), "pictures": entries}
        (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")

    def settings(self) -> Mapping[str, object]:
        """What all pairs of the condition share."""
        return {
            "condition": self.condition,
            "method": self.recipe.method,
            "regions": self.regions,
            "base_key": self.base.key,
            "steps": self.steps,
            "guidance": self.guidance,
            "training": self.recipe.config.model_dump(mode="json"),
        }


def _boxes(concepts: Sequence[Concept | Lora], prompt: str) -> list[Box]:
    first = tokens_in(prompt)[0]
    return [LEFT if concept.meta.tokens[0].token == first else RIGHT for concept in concepts]
