"""What the studies that train, draw and judge in one process have in common."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from sbora_diffusion.pages import with_tables

__all__ = ["FIGURES", "command", "study_parser", "with_tables"]

FIGURES = ("text_alignment", "pocket-clip", "efficientnet-lite2")


def command() -> str:
    """As typed, for the record."""
    return shlex.join(["python", *sys.argv])


def study_parser(
    about: str, name: str, concepts: Path, subjects: Sequence[str]
) -> argparse.ArgumentParser:
    """Options of a study whose parts write files and whose report joins them to one record.

    Args:
        name: of the record, and of the folder of the parts' files.
        concepts: folder with a folder of each subject.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--files", type=Path, default=Path(f"build/{name}"), help="of each part")
    parser.add_argument("--record", type=Path, default=Path(f"results/{name}.json"))
    parser.add_argument("--concepts", type=Path, default=concepts)
    parser.add_argument("--subjects", nargs="+", default=list(subjects), metavar="NAME")
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, of all recipes")
    parser.add_argument("--base", default="pocket")
    parser.add_argument("--judge", default="pocket-clip")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=20_000_000, help="of the pictures")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--part", type=int, default=1)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--commit", help="of the code, on a machine without its checkout")
    return parser
