"""Draw many prompts with the base, in batches of any size, and keep the pictures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sbora_diffusion.diffusion.bases import Base
from sbora_diffusion.diffusion.dataset import open_image
from sbora_diffusion.diffusion.pipeline import decode, draw_latents
from sbora_diffusion.pictures import picture_parameters, save_png


@dataclass(frozen=True)
class Drawer:
    """A base with all that decides its pictures.

    Attributes:
        pictures: folder that keeps what is drawn.
        reuse: whether to read the pictures there in place of drawing.
    """

    base: Base
    steps: int
    guidance: float
    batch: int
    seed: int
    pictures: Path | None = None
    reuse: bool = False

    def draw(self, name: str, prompts: Sequence[str]) -> list[Image.Image]:
        """One picture a prompt; picture k starts from seed + k, whatever the batch size is."""
        if self.reuse:
            return [self._read(name, k, prompt) for k, prompt in enumerate(prompts)]
        drawn: list[Image.Image] = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            seeds = [self.seed + start + k for k in range(len(part))]
            latents = draw_latents(self.base, part, seeds, self.steps, self.guidance)
            drawn += decode(self.base, latents)
        if self.pictures:
            for k, (picture, prompt) in enumerate(zip(drawn, prompts, strict=True)):
                save_png(picture, self._file(name, k), self._parameters(prompt, k))
        return drawn

    def settings(self) -> dict:
        """As the record holds them."""
        return {
            "base": self.base.public_name,
            "base_key": self.base.key,
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
        }

    def _file(self, name: str, number: int) -> Path:
        assert self.pictures
        return self.pictures / name / f"{number:04}.png"

    def _parameters(self, prompt: str, number: int) -> dict:
        return picture_parameters(
            self.base, prompt, [], seed=self.seed + number, steps=self.steps, guidance=self.guidance
        )

    def _read(self, name: str, number: int, prompt: str) -> Image.Image:
        file = self._file(name, number)
        if not file.exists():
            raise SystemExit(f"{file} is missing")
        with Image.open(file) as image:
            stored = json.loads(image.info["sbora"])
        expected = self._parameters(prompt, number)
        if {key: stored[key] for key in expected} != expected:
            raise SystemExit(f"{file} was drawn with other settings than {expected}")
        return open_image(file)
