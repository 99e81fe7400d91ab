"""The held-out list and the committed concept folders, as files."""

import tomllib
from pathlib import Path

import pytest
from PIL import Image

CONCEPTS = Path(__file__).resolve().parent.parent / "concepts"
COLUMNS = ("name", "class_noun", "category", "individual", "source", "licence", "author")
KEYS = {"name", "class_noun", "token", "category", "licence", "source"}
FOLDERS = sorted(p.parent for p in CONCEPTS.glob("*/concept.toml"))


def held_out() -> list[dict[str, str]]:
    lines = (CONCEPTS / "HELD_OUT.txt").read_text(encoding="utf-8").splitlines()
    cells = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells]


def read_concept(folder: Path) -> dict[str, str]:
    return tomllib.loads((folder / "concept.toml").read_text(encoding="utf-8"))


def test_at_least_sixty_subjects_are_held_out_mostly_3d_models():
    rows = held_out()
    assert len(rows) >= 60
    assert sum(r["individual"].startswith("sweethome3d/") for r in rows) >= 45


def test_every_held_out_subject_is_named_once_and_complete():
    rows = held_out()
    for column in ("name", "individual"):
        assert len({r[column] for r in rows}) == len(rows)
    for row in rows:
        assert row["name"].isidentifier() and row["name"].islower() and row["name"].isascii()
        assert all(row[column].strip() for column in COLUMNS)
        assert row["category"] in {"character", "object"}


def test_fourteen_concepts_are_half_characters_half_objects():
    categories = [read_concept(folder)["category"] for folder in FOLDERS]
    assert sorted(categories) == ["character"] * 7 + ["object"] * 7


def test_at_least_twelve_concepts_come_from_3d_models():
    individuals = {r["name"]: r["individual"] for r in held_out()}
    assert sum(individuals[f.name].startswith("sweethome3d/") for f in FOLDERS) >= 12


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_concept_says_what_it_is_and_is_on_the_held_out_list(folder):
    concept = read_concept(folder)
    assert concept.keys() == KEYS
    assert concept["name"] == folder.name
    assert concept["token"] == f"<{folder.name}>"
    row = next(r for r in held_out() if r["name"] == folder.name)
    for key in ("class_noun", "category", "licence"):
        assert concept[key] == row[key]
    assert row["source"] in concept["source"] and row["author"] in concept["source"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_concept_has_five_different_square_pictures(folder):
    files = sorted(p for p in folder.iterdir() if p.name != "concept.toml")
    assert len(files) == 5
    pictures = [Image.open(file).convert("RGB") for file in files]
    assert {p.size for p in pictures} == {(256, 256)}
    assert len({p.tobytes() for p in pictures}) == 5


def test_the_committed_pictures_stay_small():
    total = sum(p.stat().st_size for f in FOLDERS for p in f.iterdir())
    assert total <= 2.5 * 2**20
