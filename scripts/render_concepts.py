"""Makes the reference images of the held-out subjects, and the concept folders of the chosen ones.

Five images a subject, 256 x 256: a 3D model from five clearly different sides, an emoji tilted and
scaled, on studio backdrops with a soft contact shadow. Everything is seeded by the subject's name.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
from backdrops import BACKDROPS
from PIL import Image, ImageFilter
from world_art import ROOT, EmojiSubject, all_models, draw_emoji, fetch, held_out_rows

SIZE, PER_SUBJECT, JPEG_QUALITY = 256, 5, 90
EVERYTHING = ROOT / "build" / "concepts"
COMMITTED = ROOT / "concepts"
AZIMUTHS = (-65.0, -30.0, 5.0, 40.0, 75.0)
CHOSEN = (
    "plushbear",
    "bulldog",
    "siamese",
    "snowfriend",
    "babydoll",
    "bluejacket",
    "trex",
    "chococake",
    "toytrain",
    "toybiplane",
    "bluevase",
    "racinghelmet",
    "baseballcap",
    "pinkarmchair",
)


def generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def cut_outs(row: dict[str, str]) -> list[Image.Image]:
    """Five RGBA pictures of the subject, cropped to what is opaque."""
    if row["individual"].startswith("emoji/"):
        return emoji_cut_outs(row)
    return model_cut_outs(row)


def emoji_cut_outs(row: dict[str, str]) -> list[Image.Image]:
    """The 3D-style emoji, tilted and half of the time mirrored."""
    hexcode = row["individual"].removeprefix("emoji/")
    picture = draw_emoji(EmojiSubject("", "", hexcode, "fluent-emoji-3d"))
    rng = generator(row["name"], "emoji")
    pictures = []
    for number in range(PER_SUBJECT):
        turned = rotate(picture, rng.uniform(-16, 16))
        pictures.append(turned.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if number % 2 else turned)
    return [crop(p) for p in pictures]


def rotate(picture: Image.Image, degrees: float) -> Image.Image:
    """Turns premultiplied bands, so that no dark fringe appears."""
    bands = [
        band.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
        for band in picture.convert("RGBa").split()
    ]
    return Image.merge("RGBa", bands).convert("RGBA")


def model_cut_outs(row: dict[str, str]) -> list[Image.Image]:
    """The 3D model from five sides, under five lights."""
    from render_models import View, load, render  # needs EGL; emoji do not

    model = {m.individual: m for m in all_models()}[row["individual"]]
    drawable, rng = load(model), generator(row["name"], "views")
    elevations = rng.permutation([6.0, 13.0, 20.0, 27.0, 34.0])
    views = [
        View(
            azimuth=azimuth + float(rng.uniform(-7, 7)),
            elevation=float(elevation),
            light_azimuth=float(rng.choice([-1, 1]) * rng.uniform(15, 60)),
            light_elevation=float(rng.uniform(30, 60)),
            light_colour=tuple(rng.uniform((0.95, 0.88, 0.8), 1.0)),
            fill=float(rng.uniform(0.3, 0.55)),
        )
        for azimuth, elevation in zip(AZIMUTHS, elevations, strict=True)
    ]
    return [crop(render(drawable, view, SIZE, supersampling=2)) for view in views]


def crop(picture: Image.Image) -> Image.Image:
    return picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 12 else 0).getbbox())


def place(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The cut-out on a transparent frame: its longest side 64 to 82 % of it, slim ones more."""
    slim = min(picture.size) < 0.5 * max(picture.size)
    low, high = (0.78, 0.86) if slim else (0.64, 0.82)
    scale = rng.uniform(low, high) * SIZE / max(picture.size)
    extent = tuple(max(1, round(side * scale)) for side in picture.size)
    resized = picture.convert("RGBa").resize(extent, Image.Resampling.LANCZOS).convert("RGBA")
    free = np.array([SIZE - extent[0], SIZE - extent[1]])
    left, top = (free * (0.5 + rng.uniform(-0.28, 0.28, 2))).astype(int)
    frame = Image.new("RGBA", (SIZE, SIZE))
    frame.paste(resized, (int(left), int(top)))
    return frame


def contact_shadow(alpha: np.ndarray) -> np.ndarray:
    """Darkness 0..1 (SIZE, SIZE): the silhouette flattened onto the floor below it, blurred."""
    rows = np.flatnonzero(alpha.max(1) > 0.2)
    top, bottom = rows[0], rows[-1] + 1
    flat_height = max(6, (bottom - top) // 6)
    silhouette = Image.fromarray((alpha[top:bottom] * 255).astype(np.uint8))
    flat = silhouette.resize((SIZE, flat_height), Image.Resampling.BOX)
    shadow = Image.new("L", (SIZE, SIZE))
    shadow.paste(flat, (0, int(bottom - flat_height * 0.62)))
    wide = np.asarray(shadow.filter(ImageFilter.GaussianBlur(9)), float) / 255
    tight = np.asarray(shadow.filter(ImageFilter.GaussianBlur(3)), float) / 255
    return 0.40 * wide + 0.30 * tight


def compose(picture: Image.Image, backdrop: np.ndarray, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(place(picture, rng), float) / 255
    alpha = pixels[..., 3]
    floor = backdrop * (1 - contact_shadow(alpha))[..., None]
    picture = pixels[..., :3] * alpha[..., None] + floor * (1 - alpha[..., None])
    return Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8))


def reference_images(row: dict[str, str]) -> list[Image.Image]:
    """Five pictures, each on a different kind of backdrop."""
    rng = generator(row["name"], "backdrops")
    kinds = rng.choice(len(BACKDROPS), PER_SUBJECT, replace=False)
    return [
        compose(picture, BACKDROPS[kind](SIZE, rng), rng)
        for picture, kind in zip(cut_outs(row), kinds, strict=True)
    ]


def concept_toml(row: dict[str, str]) -> str:
    fields = {
        "name": row["name"],
        "class_noun": row["class_noun"],
        "token": f"<{row['name']}>",
        "category": row["category"],
        "licence": row["licence"],
        "source": f"{row['source']}, by {row['author']}",
    }
    return "".join(f'{key} = "{value}"\n' for key, value in fields.items())


def write_concept(row: dict[str, str], images: list[Image.Image], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "concept.toml").write_text(concept_toml(row), encoding="utf-8")
    for number, image in enumerate(images, 1):
        image.save(folder / f"{number:02d}.jpg", quality=JPEG_QUALITY, subsampling=0)


def render_row(row: dict[str, str]) -> str | None:
    """Writes one subject's folder(s); a fault is returned, so that the rest go on."""
    try:
        images = reference_images(row)
    except Exception as fault:
        return f"{row['name']}: {fault!r}"
    write_concept(row, images, EVERYTHING / row["name"])
    if row["name"] in CHOSEN:
        write_concept(row, images, COMMITTED / row["name"])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these subjects (default: all held out)")
    arguments = parser.parse_args()
    fetch()
    rows = [r for r in held_out_rows() if not arguments.names or r["name"] in arguments.names]
    faults = [fault for fault in map(render_row, rows) if fault]
    print("\n".join([*faults, f"{len(rows) - len(faults)} of {len(rows)} subjects rendered"]))


if __name__ == "__main__":
    main()
