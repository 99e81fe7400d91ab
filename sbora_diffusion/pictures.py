"""Pictures with their parameters inside, and what a prompt cannot say."""

import io
import json
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from sbora_diffusion import __version__
from sbora_diffusion.core.storage import canonical_json, write_atomically
from sbora_diffusion.outputs import make_parent

if TYPE_CHECKING:  # whoever only reads pictures does without diffusers
    from sbora_diffusion.core.concept import Concept
    from sbora_diffusion.diffusion.bases import Base


def picture_parameters(
    base: "Base",
    prompt: str,
    concepts: "Sequence[tuple[Concept, float]]",
    *,
    seed: int,
    steps: int,
    guidance: float,
    negative_prompt: str = "",
) -> dict[str, Any]:
    """Everything that decides one picture; concepts by name and digest, never by path."""
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "base": base.public_name,
        "base_key": base.key,
        "concepts": [
            {"name": concept.meta.name, "digest": concept.meta.digest, "weight": weight}
            for concept, weight in concepts
        ],
    }


def save_png(image: Image.Image, path: Path, parameters: dict[str, Any]) -> None:
    """Write a PNG whose text chunks say how it was made; equal input gives equal bytes.

    The chunk `parameters` is for people and for other tools (the layout of AUTOMATIC1111's web
    interface), `sbora` holds the same as JSON.

    Raises:
        ResourceError: it cannot be written; an older file of that name is untouched.
    """
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", readable_parameters(parameters, image.size).replace("\0", " "))
    chunks.add_text("sbora", canonical_json({"version": __version__, **parameters}))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=chunks)
    make_parent(path)
    write_atomically(path, buffer.getvalue())


def read_parameters(path: Path) -> dict[str, Any]:
    """What `save_png` noted in a picture; empty if there is nothing that can be read."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = json.loads(image.info["sbora"])
    except (
        OSError, SyntaxError, ValueError, LookupError, TypeError, RecursionError,
        Image.DecompressionBombError,
    ):  # fmt: skip
        return {}
    return found if isinstance(found, dict) else {}


def read_prompt(path: Path) -> str | None:
    """The prompt that `save_png` noted in a picture; None if there is none that can be read."""
    prompt = read_parameters(path).get("prompt")
    return prompt if isinstance(prompt, str) else None


def readable_parameters(parameters: dict[str, Any], size: tuple[int, int]) -> str:
    """Prompt, negative prompt, and one line of `key: value` pairs."""
    lines = [str(parameters.get("prompt", ""))]
    if negative := parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {negative}")
    labels = {"steps": "Steps", "guidance": "CFG scale", "seed": "Seed"}
    pairs = [f"{label}: {parameters[key]}" for key, label in labels.items() if key in parameters]
    pairs.append(f"Size: {size[0]}x{size[1]}")
    if base := parameters.get("base") or parameters.get("base_key"):
        pairs.append(f"Model: {base}")
    concepts = [f"{c['name']}:{c['weight']:g}" for c in parameters.get("concepts", [])]
    if concepts:
        pairs.append(f'Concepts: "{" ".join(concepts)}"')
    return "\n".join([*lines, ", ".join(pairs)])


def words_cut_off(base: "Base", prompt: str) -> str:
    """The end of a prompt that does not fit into the text encoder, "" if all of it does."""
    from sbora_diffusion.diffusion.tokens import expanded

    tokenizer, words = base.pipeline.tokenizer, prompt.split()
    limit = tokenizer.model_max_length - 2  # begin and end of text

    def too_long(count: int) -> bool:
        text = expanded(" ".join(words[:count]), tokenizer)
        return len(tokenizer(text, add_special_tokens=False).input_ids) > limit

    fitting = bisect_left(range(len(words) + 1), True, key=too_long) - 1
    return " ".join(words[fitting:])
