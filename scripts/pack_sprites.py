"""Packs the world's art: `sprites.bin` (WebP blobs) and `sprites.json` (what each one is).

Held-out subjects (`concepts/HELD_OUT.txt`) carry their name under `held_out`, in every set: the
judge learns them, the base must not. The class noun of each must be known from at least three
other individuals, or nothing is written. The emoji pictures that committed references are made of
are left out altogether; of 3D models the references show other views under other lights.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from world_art import (
    ROOT,
    all_models,
    draw_emoji,
    emoji_subjects,
    fetch,
    held_out_rows,
    models,
)
from world_nouns import ACCESSORIES
from world_tables import EMOJI_SETS

WORLD = ROOT / "build" / "world"
VIEWS = WORLD / "views"  # written by render_models.py: LIBRARY/MODEL/NN.png
SIZE, LONGEST, LIMIT = 96, 92, 12 * 2**20
ALPHA_QUALITY = 72  # 32 levels: enough for soft edges, a quarter smaller than 85
MIN_INDIVIDUALS = 3
REFERENCE_SET = "fluent-emoji-3d"  # render_concepts.py draws emoji references from this one
COMMITTED = {path.parent.name for path in (ROOT / "concepts").glob("*/concept.toml")}


def fit(image: Image.Image, size: int = SIZE, longest: int = LONGEST) -> Image.Image | None:
    """The subject cropped to its opaque box, scaled and centred; None if there is nothing."""
    box = image.getchannel("A").point(lambda a: 255 if a > 12 else 0).getbbox()
    if box is None or max(box[2] - box[0], box[3] - box[1]) < 16:
        return None
    cropped = image.crop(box)
    scale = longest / max(cropped.size)
    extent = tuple(max(1, round(side * scale)) for side in cropped.size)
    resized = premultiplied_resize(cropped, extent)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(resized, ((size - extent[0]) // 2, (size - extent[1]) // 2))
    return canvas


def premultiplied_resize(image: Image.Image, extent: tuple[int, int]) -> Image.Image:
    """Resizes without letting the colour of transparent pixels bleed into the edge."""
    return image.convert("RGBa").resize(extent, Image.Resampling.LANCZOS).convert("RGBA")


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, alpha_quality=ALPHA_QUALITY, method=6)
    return buffer.getvalue()


def entry(subject: object, held: dict | None, style: str, view: int, licence: str) -> dict:
    return {
        "noun": held["class_noun"] if held else subject.noun,
        "held_out": held["name"] if held else None,
        "kind": "subject",
        "style": style,
        "category": subject.category,
        "individual": subject.individual,
        "view": view,
        "source": subject.source,
        "licence": licence,
    }


def emoji_sprites(held_out: dict[str, dict]) -> Iterator[tuple[dict, Image.Image]]:
    """Every emoji in every set, but for the pictures that are committed as references."""
    for subject in emoji_subjects():
        held = held_out.get(subject.hexcode)
        if held and held["name"] in COMMITTED and subject.set_name == REFERENCE_SET:
            continue
        facts = EMOJI_SETS[subject.set_name]
        yield entry(subject, held, facts["style"], 0, facts["licence"]), draw_emoji(subject)


def model_sprites(held_out: dict[str, dict]) -> Iterator[tuple[dict, Image.Image]]:
    """Every rendered view of the curated and of the held-out models."""
    curated = models()
    for model in [*curated, *(m for m in all_models() if m not in curated)]:
        held = held_out.get(model.individual)
        if held is None and model not in curated:
            continue
        folder = VIEWS / model.library / model.model_id
        for view, path in enumerate(sorted(folder.glob("*.png"))):
            yield entry(model, held, "photo", view, model.licence), Image.open(path)


def held_out_individuals() -> dict[str, dict[str, str]]:
    """Individual (hexcode of an emoji in any set, identifier of a model) → its row."""
    return {row["individual"].removeprefix("emoji/"): row for row in held_out_rows()}


def check_class_nouns(entries: Iterable[dict]) -> None:
    """Raises ValueError where a held-out subject's class noun is hardly known to the base."""
    known: dict[str, set[str]] = defaultdict(set)
    for item in entries:
        if item["held_out"] is None:
            known[item["noun"]].add(item["individual"])
    rows = held_out_rows()
    poor = [r for r in rows if len(known[r["class_noun"]]) < MIN_INDIVIDUALS]
    if poor:
        names = ", ".join(f"{r['name']} ({r['class_noun']})" for r in poor)
        raise ValueError(f"class nouns known from fewer than {MIN_INDIVIDUALS} others: {names}")


def accessory_entries(entries: list[dict]) -> list[dict]:
    """The wearable ones again, under the accessory's noun; they share the subject's bytes."""
    worn = [
        e
        for e in entries
        if e["individual"].split("/")[-1] in ACCESSORIES and not e["view"] and not e["held_out"]
    ]
    nouns = [ACCESSORIES[e["individual"].split("/")[-1]] for e in worn]
    return [e | {"kind": "accessory", "noun": n} for e, n in zip(worn, nouns, strict=True)]


def pack(quality: int) -> dict[str, int]:
    """Writes both files and returns counts."""
    held_out = held_out_individuals()
    pairs = [*emoji_sprites(held_out), *model_sprites(held_out)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        fitted = list(pool.map(lambda pair: fit(pair[1]), pairs))
        kept = [(e, i) for (e, _), i in zip(pairs, fitted, strict=True) if i is not None]
        blobs = list(pool.map(lambda pair: encode(pair[1], quality), kept))
    entries, offset = [], 0
    for (item, _), blob in zip(kept, blobs, strict=True):
        entries.append({"offset": offset, "length": len(blob)} | item)
        offset += len(blob)
    check_class_nouns(entries)
    if offset > LIMIT:
        raise ValueError(f"{offset} bytes of sprites, at most {LIMIT}: lower --quality")
    entries += accessory_entries(entries)
    write(b"".join(blobs), {"size": SIZE, "sprites": entries})
    return counts(entries, offset, len(pairs) - len(kept))


def write(blob: bytes, index: dict) -> None:
    WORLD.mkdir(parents=True, exist_ok=True)
    (WORLD / "sprites.bin").write_bytes(blob)
    text = ",\n".join(json.dumps(e, ensure_ascii=False) for e in index["sprites"])
    (WORLD / "sprites.json").write_text(
        f'{{"size": {index["size"]}, "sprites": [\n{text}\n]}}\n', encoding="utf-8"
    )


def counts(entries: list[dict], size: int, empty: int) -> dict[str, object]:
    individuals: dict[str, set[str]] = defaultdict(set)
    for item in entries:
        individuals[item["style"]].add(item["individual"])
    return {
        "bytes": size,
        "sprites": len(entries),
        "left out as empty": empty,
        "held out": len({e["held_out"] for e in entries} - {None}),
        "nouns": len({e["noun"] for e in entries}),
        "individuals by style": {s: len(i) for s, i in individuals.items()},
    }


def check_pack(folder: Path = WORLD) -> None:
    """Raises ValueError unless every sprite decodes to SIZE x SIZE RGBA and shows something."""
    index = json.loads((folder / "sprites.json").read_text(encoding="utf-8"))
    blob = (folder / "sprites.bin").read_bytes()
    for item in index["sprites"]:
        data = blob[item["offset"] : item["offset"] + item["length"]]
        pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
        opaque = (pixels[..., 3] > 64).mean()
        if pixels.shape != (SIZE, SIZE, 4) or opaque < 0.01:
            raise ValueError(f"{item['individual']} view {item['view']}: no picture")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quality", type=int, default=75, help="WebP quality of the colours")
    arguments = parser.parse_args()
    fetch()
    print(json.dumps(pack(arguments.quality), indent=2))
    check_pack()


if __name__ == "__main__":
    main()
