"""The paper's tables on images, and published figures of the methods it compares with."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sbora_diffusion.core.settings import read_toml, validate

FILE = Path(__file__).parent / "paper.toml"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cells(_Entry):
    """One method in one of the two tables; the mean is that of the two categories."""

    character: float
    object: float
    mean: float


class Single(_Entry):
    """One method, each concept alone.

    Attributes:
        suspect: doubtful cells, "text.character" for instance.
        reason: why they are doubtful.
    """

    method: str
    text: Cells
    image: Cells
    suspect: tuple[str, ...] = ()
    reason: str = ""

    @model_validator(mode="after")
    def _suspects_are_cells_with_a_reason(self) -> "Single":
        cells = {
            f"{table}.{column}" for table in ("text", "image") for column in Cells.model_fields
        }
        if unknown := sorted(set(self.suspect) - cells):
            raise ValueError(f"suspect names no cell: {', '.join(unknown)}")
        if bool(self.suspect) != bool(self.reason):
            raise ValueError("suspect cells and a reason must come together")
        return self


class Bound(_Entry):
    """The bare class word: an upper bound of text alignment, a lower one of image alignment."""

    category: str
    text: float
    image: float
    source: str


class Published(_Entry):
    """Figures from elsewhere by category; `protocol` is one of `evaluation.protocols`."""

    method: str
    protocol: str
    source: str
    text: dict[str, float]
    image: dict[str, float]
    dino: dict[str, float] = Field(default_factory=dict)


class Merging(_Entry):
    """What merging so many concepts did elsewhere: pairs before and after, or the mean change."""

    method: str
    concepts: int
    source: str
    time: str | None = None
    text: tuple[float, float] | None = None
    image: tuple[float, float] | None = None
    identity: tuple[float, float] | None = None
    image_change: float | None = None

    @model_validator(mode="after")
    def _the_image_figure_is_a_pair_or_a_change(self) -> "Merging":
        if (self.image is None) == (self.image_change is None):
            raise ValueError("must have either image or image_change")
        return self

    def change(self, figure: Literal["text", "image", "identity"]) -> float | None:
        """After minus before, where it is known."""
        pair = {"text": self.text, "image": self.image, "identity": self.identity}[figure]
        if pair is None:
            return self.image_change if figure == "image" else None
        return round(pair[1] - pair[0], 4)


class Misprint(_Entry):
    """What is printed somewhere, and what must be meant."""

    where: str
    printed: str
    meant: str
    reason: str


class Paper(_Entry):
    """All of `paper.toml`; unknown keys are refused."""

    source: str
    base: str
    single: tuple[Single, ...]
    bounds: tuple[Bound, ...]
    published: tuple[Published, ...]
    merging: tuple[Merging, ...]
    misprints: tuple[Misprint, ...]


def load_paper(file: Path = FILE) -> Paper:
    """Read the figures.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, missing or has a wrong value.
    """
    return validate(Paper, read_toml(file), str(file))
