"""Fetches and reads the openly licensed art that the pocket base's world is made of.

Two npm packages of pictures and one of names, and one Debian package of 3D models, are unpacked
into `build/art`. Nothing here draws: `render_models.py` and `pack_sprites.py` do.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image
from world_models import EXCLUDED_MODELS, MODEL_NOUNS
from world_nouns import RENAMED
from world_tables import DROPPED, EMOJI_SETS, EXTRA, LIBRARY_LICENCE, SUBGROUPS

ROOT = Path(__file__).resolve().parent.parent
ART = ROOT / "build" / "art"
HELD_OUT = ROOT / "concepts" / "HELD_OUT.txt"
NPM_PACKAGES = {
    "@lobehub/fluent-emoji-3d": "1.1.0",
    "@iconify/json": "2.2.535",
    "emojibase-data": "17.0.0",
}
DEBIAN_PACKAGE = "sweethome3d-furniture"
EGL_PACKAGES = ("libegl1", "libgl1-mesa-dri", "libegl-mesa0", "libgles2")  # render_models.py
MODELS_OF_A_NOUN = 10


@dataclass(frozen=True)
class EmojiSubject:
    """One emoji of one set: an individual of its noun."""

    noun: str
    category: str
    hexcode: str  # lower case, joined by "-", without variation selectors
    set_name: str

    @property
    def individual(self) -> str:
        return f"{self.set_name}/{self.hexcode}"

    @property
    def source(self) -> str:
        if self.set_name == "fluent-emoji-3d":
            file = Path(pictures(self.set_name)[self.hexcode]).name
            return f"@lobehub/fluent-emoji-3d assets/{file}"
        return f"@iconify/json json/{self.set_name}.json {self.hexcode}"


@dataclass(frozen=True)
class Model:
    """One 3D model of the furniture package."""

    noun: str
    category: str
    name: str  # as the catalogue prints it
    library: str
    model_id: str  # the part of the catalogue's id after "#"
    path: Path  # of the OBJ file
    author: str
    rotation: tuple[float, ...] | None  # 3x3, row by row, where the catalogue turns the model

    @property
    def individual(self) -> str:
        return f"sweethome3d/{self.library}/{self.model_id}"

    @property
    def licence(self) -> str:
        return LIBRARY_LICENCE[self.library]

    @property
    def source(self) -> str:
        return f"{DEBIAN_PACKAGE} {self.library}.sh3f {self.path.relative_to(library_dir(self))}"


def library_dir(model: Model) -> Path:
    return ART / "models" / model.library


def fetch(art: Path = ART) -> None:
    """Downloads the packages by name, through npm and apt, and unpacks what is needed of them."""
    art.mkdir(parents=True, exist_ok=True)
    for package, version in NPM_PACKAGES.items():
        folder = art / npm_folder(package)
        if not folder.exists():
            unpack_npm(package, version, art, folder)
    if not (art / "models").exists():
        unpack_models(art)


def npm_folder(package: str) -> str:
    return package.replace("@", "").replace("/", "-")


def unpack_npm(package: str, version: str, art: Path, folder: Path) -> None:
    archive = art / f"{npm_folder(package)}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", f"{package}@{version}"], cwd=art, check=True)
    with tarfile.open(archive) as tar:
        members = [m for m in tar if m.isfile() and wanted(m.name)]
        for member in members:
            member.name = member.name.removeprefix("package/")
        tar.extractall(folder, members=members, filter="data")


def wanted(name: str) -> bool:
    """Of a npm package, only pictures, English names, the icon sets in use, and notices."""
    sets = tuple(f"package/json/{set_name}.json" for set_name in EMOJI_SETS)
    prefixes = (
        "package/assets/",
        "package/en/data.json",
        "package/meta/groups.json",
        "package/collections.json",
        "package/LICENSE",
        "package/README",
        *sets,
    )
    return name.startswith(prefixes)


def unpack_models(art: Path) -> None:
    debs = list(art.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    if not debs:
        subprocess.run(["apt-get", "download", DEBIAN_PACKAGE], cwd=art, check=True)
        debs = list(art.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", str(debs[0]), str(art / "deb")], check=True)
    for library in sorted((art / "deb").rglob("*.sh3f")):
        with zipfile.ZipFile(library) as archive:
            archive.extractall(art / "models" / library.stem)


@cache
def emoji_labels(art: Path = ART) -> dict[str, tuple[str, str]]:
    """hexcode (lower case, no variation selectors) -> (label, subgroup)."""
    folder = art / npm_folder("emojibase-data")
    subgroups = json.loads((folder / "meta/groups.json").read_text())["subgroups"]
    records = json.loads((folder / "en/data.json").read_text())
    return {
        plain_hexcode(r["hexcode"]): (r["label"], subgroups[str(r["subgroup"])])
        for r in records
        if "subgroup" in r
    }


def plain_hexcode(hexcode: str) -> str:
    return re.sub(r"-fe0f", "", hexcode.lower())


def noun_of_label(label: str) -> str:
    """>>> noun_of_label("lion face")
    'lion'
    """
    if label in RENAMED:
        return RENAMED[label]
    return re.sub(r" face$", "", label.split(":")[0]).lower()


def emoji_subjects(art: Path = ART) -> list[EmojiSubject]:
    """Every curated emoji in every set that has it."""
    subjects = []
    for hexcode, (label, subgroup) in emoji_labels(art).items():
        category = EXTRA.get(label) or SUBGROUPS.get(subgroup)
        if category is None or label in DROPPED:
            continue
        noun = label if category == "face" else noun_of_label(label)
        found = [s for s in EMOJI_SETS if hexcode in pictures(s, art)]
        subjects += [EmojiSubject(noun, category, hexcode, s) for s in found]
    return subjects


@cache
def pictures(set_name: str, art: Path = ART) -> dict[str, str]:
    """hexcode -> file (of the 3D set) or icon name (of an icon set)."""
    if set_name == "fluent-emoji-3d":
        files = sorted((art / npm_folder("@lobehub/fluent-emoji-3d") / "assets").glob("*.webp"))
        return {plain_hexcode(f.stem): str(f) for f in files}
    icons = icon_set(set_name, art)
    if "chars" in icons:
        known = icons["icons"]
        return {plain_hexcode(c): n for c, n in icons["chars"].items() if n in known}
    slugs = {slug(label): hexcode for hexcode, (label, _) in emoji_labels(art).items()}
    return {slugs[name]: name for name in icons["icons"] if name in slugs}


def slug(label: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "")).strip("-")


@cache
def icon_set(set_name: str, art: Path = ART) -> dict:
    folder = art / npm_folder("@iconify/json")
    return json.loads((folder / "json" / f"{set_name}.json").read_text())


def draw_emoji(subject: EmojiSubject, size: int = 256, art: Path = ART) -> Image.Image:
    """The emoji as RGBA, `size` pixels high (icon sets) or as it is stored (the 3D set)."""
    picture = pictures(subject.set_name, art)[subject.hexcode]
    if subject.set_name == "fluent-emoji-3d":
        return Image.open(picture).convert("RGBA")
    return draw_icon(icon_set(subject.set_name, art), picture, size)


def draw_icon(icons: dict, name: str, size: int) -> Image.Image:
    import resvg_py  # only the icon sets need it

    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def models(art: Path = ART) -> list[Model]:
    """The curated 3D models, at most MODELS_OF_A_NOUN each (chairs alone would be 45)."""
    found = all_models(art)
    number: Counter[str] = Counter()
    kept = []
    for model in sorted(found, key=lambda m: hashlib.sha256(m.individual.encode()).digest()):
        number[model.noun] += 1
        if number[model.noun] <= MODELS_OF_A_NOUN:
            kept.append(model)
    return kept


def all_models(art: Path = ART) -> list[Model]:
    """Every 3D model with a noun, held-out ones included."""
    return [m for library in LIBRARY_LICENCE for m in library_models(library, art)]


def library_models(library: str, art: Path) -> Iterator[Model]:
    folder = art / "models" / library
    for fields in catalogue(folder / "PluginFurnitureCatalog.properties"):
        model_id = fields["id"].split("#")[-1]
        key = f"{library}/{model_id}"
        noun, category = MODEL_NOUNS.get(key) or MODEL_NOUNS.get(fields["name"], (None, None))
        if noun is None or key in EXCLUDED_MODELS:
            continue
        rotation = fields.get("modelRotation")
        yield Model(
            noun=noun,
            category=category,
            name=fields["name"],
            library=library,
            model_id=model_id,
            path=folder / fields["model"].lstrip("/"),
            author=fields.get("creator", ""),
            rotation=tuple(map(float, rotation.split())) if rotation else None,
        )


def catalogue(path: Path) -> list[dict[str, str]]:
    """The entries of a Java properties file whose keys end in "#number"."""
    entries: dict[int, dict[str, str]] = {}
    for line in path.read_text(encoding="latin-1").splitlines():
        match = re.match(r"(\w+)#(\d+)=(.*)", line.strip())
        if match:
            entries.setdefault(int(match[2]), {})[match[1]] = match[3].strip()
    return list(entries.values())


def held_out_rows(path: Path = HELD_OUT) -> list[dict[str, str]]:
    """The rows of the held-out list as dictionaries."""
    keys = ("name", "class_noun", "category", "individual", "source", "licence", "author")
    lines = path.read_text().splitlines() if path.exists() else []
    cells = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [dict(zip(keys, row, strict=True)) for row in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the nouns and their number")
    parser.add_argument("--system", action="store_true", help="install EGL through apt-get, too")
    arguments = parser.parse_args()
    if arguments.system:
        subprocess.run(["apt-get", "install", "-y", *EGL_PACKAGES], check=True)
    fetch()
    emoji, furniture = emoji_subjects(), models()
    nouns = sorted({s.noun for s in emoji} | {m.noun for m in furniture})
    print(f"{len(emoji)} emoji pictures, {len(furniture)} models, {len(nouns)} nouns")
    if arguments.list:
        print("; ".join(nouns))


if __name__ == "__main__":
    main()
