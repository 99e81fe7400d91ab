"""Writes `sbora_diffusion/pocket/LICENCES.md` from the packed sprites and the concepts."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict

from pack_sprites import WORLD
from render_concepts import CHOSEN
from world_art import NPM_PACKAGES, ROOT, all_models, fetch, held_out_rows, models
from world_tables import LIBRARY_LICENCE

TARGET = ROOT / "sbora_diffusion" / "pocket" / "LICENCES.md"
SETS = {
    "fluent-emoji-3d": ("Fluent Emoji (3D), © Microsoft Corporation", "MIT"),
    "fluent-emoji-flat": ("Fluent Emoji (flat), © Microsoft Corporation", "MIT"),
    "noto": ("Noto Emoji, © Google Inc", "Apache-2.0"),
    "noto-v1": ("Noto Emoji v1, © Google Inc", "Apache-2.0"),
    "twemoji": ("Twemoji, © Twitter, Inc and other contributors", "CC-BY 4.0"),
}
LIBRARY_AUTHORS = {
    "BlendSwap-CC-0": "Emmanuel Puybaret / eTeks and other contributors",
    "BlendSwap-CC-BY": "the BlendSwap contributors",
    "KatorLegaz": "© 2003-2008 Andrew Kator & Jennifer Legaz",
    "Reallusion": "© 2008-2011 Reallusion",
    "Scopia": "© 2010-2012 Scopia Visual Interfaces Systems, s.l.",
}
MODELS_VERSION = "1.8-1"
LICENCE_LINKS = """\
- MIT: <https://opensource.org/license/mit>
- Apache-2.0: <https://www.apache.org/licenses/LICENSE-2.0>
- CC0 1.0: <https://creativecommons.org/publicdomain/zero/1.0/>
- CC-BY 3.0: <https://creativecommons.org/licenses/by/3.0/>
- CC-BY 3.0 US: <https://creativecommons.org/licenses/by/3.0/us/>
- CC-BY 4.0: <https://creativecommons.org/licenses/by/4.0/>
"""
INTRODUCTION = """\
# Licences of the art behind the pocket base

The weights in this folder, the judge's in `clip/` among them, were trained by this project on
scenes composed of the openly licensed pictures listed here. The base never saw the held-out
subjects; the judge saw pictures and views of them that are not among the references. The concepts
in `concepts/` show fourteen of the held-out subjects.
All works were changed: icons were rasterised and scaled, 3D models rendered from several sides,
and both were placed on backgrounds drawn by this project's own programs. The authors named here
do not endorse this project. No share-alike or non-commercial work was used.

The concept files in `examples/` were trained from folders of `concepts/` and share their licences:
`sbora train concepts/plushbear --steps 200 -s save_dtype=fp16 --slot 17`, `baseballcap` in slot 18
and `trex` in slot 19, the last ones, so that a person's own concepts stay disjoint from them.
"""


def emoji_table(sprites: list[dict]) -> str:
    number = Counter(
        s["individual"].split("/")[0] for s in sprites if s["kind"] == "subject" and not s["view"]
    )
    packages = {"fluent-emoji-3d": "@lobehub/fluent-emoji-3d"}
    lines = ["| work | licence | package | pictures |", "|---|---|---|---|"]
    for set_name, (work, licence) in SETS.items():
        package = packages.get(set_name, "@iconify/json")
        lines.append(
            f"| {work} | {licence} | npm `{package}` {NPM_PACKAGES[package]} | {number[set_name]} |"
        )
    return "\n".join(lines)


def model_table(sprites: list[dict]) -> str:
    used = {s["individual"] for s in sprites}
    number = Counter(m.library for m in models() if m.individual in used)
    lines = ["| library | licence | rights | models |", "|---|---|---|---|"]
    for library, licence in LIBRARY_LICENCE.items():
        lines.append(f"| {library} | {licence} | {LIBRARY_AUTHORS[library]} | {number[library]} |")
    return "\n".join(lines)


def attributions(sprites: list[dict]) -> str:
    """Author by author, the models that the base saw."""
    used = {s["individual"] for s in sprites}
    by_author: dict[tuple[str, str], list[str]] = defaultdict(list)
    for model in models():
        if model.individual in used:
            by_author[model.library, model.author].append(model.model_id)
    return "\n".join(
        f"- {library}, {author}: {', '.join(sorted(ids))}"
        for (library, author), ids in sorted(by_author.items())
    )


def held_out_table() -> str:
    named = {m.individual: m for m in all_models()}
    lines = ["| subject | in `concepts/` | work | author | licence |", "|---|---|---|---|---|"]
    for row in held_out_rows():
        model = named.get(row["individual"])
        work = f"“{model.name}”, {row['source']}" if model else row["source"]
        chosen = "yes" if row["name"] in CHOSEN else ""
        lines.append(f"| {row['name']} | {chosen} | {work} | {row['author']} | {row['licence']} |")
    return "\n".join(lines)


def licences(sprites: list[dict]) -> str:
    return "\n".join(
        [
            INTRODUCTION,
            "## Pictures the base was trained on",
            emoji_table(sprites),
            f"\nNames come from npm `emojibase-data` {NPM_PACKAGES['emojibase-data']} (MIT).\n",
            f"## 3D models the base was trained on\n"
            f"Debian `sweethome3d-furniture` {MODELS_VERSION}, "
            "the libraries of Sweet Home 3D:\n",
            model_table(sprites),
            "\nAuthors as the package states them, with the models' identifiers:\n",
            attributions(sprites),
            "\n## Held-out subjects\n"
            "Of the emoji among them the judge saw every set listed above.\n",
            held_out_table(),
            "\n## Texts of the licences\n" + LICENCE_LINKS,
        ]
    )


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    fetch()
    packed = json.loads((WORLD / "sprites.json").read_text(encoding="utf-8"))["sprites"]
    sprites = [sprite for sprite in packed if sprite["held_out"] is None]
    TARGET.write_text(licences(sprites), encoding="utf-8")


if __name__ == "__main__":
    main()
