from dataclasses import dataclass
from itertools import pairwise

import pytest
from PIL import Image

from sbora_diffusion.core.concept import write_concept
from sbora_diffusion.holdings import holdings, picture
from sbora_diffusion.library import Library
from sbora_diffusion.ownership import layer_groups, owned, price, room
from sbora_diffusion.plots import (
    FREE,
    LINE,
    MARGIN,
    STRIP,
    STRIP_WIDTH,
    Heat,
    Section,
    Strips,
    heat_colour,
    heat_picture,
    ownership_picture,
)
from tests.core.concept_examples import make_concept

WIDTHS = {
    "unet.a.attn2.to_k": 192,
    "unet.a.attn1.to_q": 160,
    "unet.b.attn1.to_q": 160,
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": 192,
}


@dataclass(frozen=True)
class Owned:
    start: int
    stop: int

    @property
    def rank(self) -> int:
        return self.stop - self.start


def slots(rank: int, *numbers: int) -> list[Owned]:
    return [Owned(slot * rank, (slot + 1) * rank) for slot in numbers]


def test_the_price_is_said_of_the_narrowest_layers():
    text = price("fa", slots(8, *range(14)), WIDTHS)
    assert text == (
        "14 concepts at rank 8 own 112 of 160 columns (70 %) of the narrowest layers; "
        "6 more at rank 8 fit"
    )


@pytest.mark.parametrize(
    ("variant", "ranges", "parts"),
    [
        ("fb", slots(8, 3), ("1 concept at rank 8 owns 8 of 160 rows (5 %)", "19 more")),
        ("fa", slots(4, 0) + slots(8, 1), ("2 concepts at ranks 4 and 8 own 12", "18 more at ran")),
        ("fa", slots(2, 0) + slots(4, 1) + slots(8, 1), ("ranks 2, 4 and 8 own 14",)),
        ("fa", slots(8, 0, 0), ("own 8 of 160",)),  # sharing a slot costs it once
        ("fa", slots(16, 0, 11), ("own 16 of 160", "9 more")),  # the other lies beyond the width
    ],
)
def test_the_price_of_other_sets(variant, ranges, parts):
    for part in parts:
        assert part in price(variant, ranges, WIDTHS)


def test_groups_are_layers_of_one_kind_and_width_with_the_narrowest_first():
    groups = layer_groups(WIDTHS, slots(8, 0, 22))
    assert [(g.kind, g.width, len(g.layers), g.owned) for g in groups] == [
        ("self-attention", 160, 2, 8),
        ("cross-attention", 192, 1, 16),
        ("text encoder", 192, 1, 16),
    ]
    assert groups[0].share == 0.05


def test_room_counts_aligned_ranges_as_the_library_hands_them_out():
    assert room([], 20, 8) == 2
    assert room(slots(4, 1), 16, 8) == 1
    assert room(slots(4, 0, 2), 16, 8) == 0 and owned(slots(4, 0, 2), 16) == 8


@pytest.fixture
def library(tmp_path) -> Library:
    """Two FA concepts, one of which has no file, and an FB concept."""
    library = Library(tmp_path / "library.sqlite3")
    for name, variant, slot in (("dog", "fa", 0), ("cat", "fa", 1), ("owl", "fb", 0)):
        concept = make_concept(name, variant, slot=slot)
        library.reserve("b", variant, name, 4, concept.meta.widths, slot)
        path = tmp_path / f"{name}.safetensors"
        digest = write_concept(path, concept)
        library.record("b", variant, name, path, digest, f"<{name}>")
    (tmp_path / "cat.safetensors").unlink()
    return library


def test_holdings_are_kept_apart_by_variant(library):
    fa, fb = holdings(library)
    assert [entry.name for entry in fa.entries] == ["dog", "cat"]
    assert fa.price.startswith("2 concepts at rank 4 own 8 of 16 columns (50 %)")
    assert fb.price.startswith("1 concept at rank 4 owns 4 of 16 rows (25 %)")
    assert [(g["kind"], g["layers"], g["width"], g["owned"]) for g in fa.document()["groups"]] == [
        ("cross-attention", 1, 16, 8),
        ("text encoder", 1, 16, 8),
        ("cross-attention", 1, 24, 8),
    ]
    assert fa.rows()[0] == ["1 × cross-attention", "16", "8 columns", "50 %"]


def test_a_holding_without_known_widths_says_so(library):
    (fa, _) = holdings(library)
    unknown = type(fa)(fa.base, fa.variant, fa.entries, {})
    assert "not known" in unknown.price and unknown.groups == []
    assert unknown.document()["groups"] == []


def test_the_picture_of_a_library_shows_missing_files_by_their_range_alone(library):
    both = picture(holdings(library))
    dog_alone = picture(holdings(library), highlight="dog")
    assert both.size == dog_alone.size and both.tobytes() != dog_alone.tobytes()
    (library.path.parent / "dog.safetensors").write_text("damaged")
    assert picture(holdings(library)).size == both.size


def test_a_strip_shows_every_index_in_its_place():
    strips = Strips("layers", 8, {"dog": (0, 2), "cat": (6, 8)}, [{"dog": [3, 5], "cat": [0, 7]}])
    drawn = ownership_picture([Section("title", "text", [strips], {"dog": "dog", "cat": "cat"})])
    rows = [
        [drawn.getpixel((MARGIN + int((k + 0.5) * STRIP_WIDTH / 8), y)) for k in range(8)]
        for y in range(drawn.height)
    ]
    free = Image.new("RGB", (1, 1), FREE).getpixel((0, 0))
    strip = max(rows, key=lambda row: row[2:6] == [free] * 4 and row[0] != row[7] != free)
    dog, cat = strip[0], strip[7]
    assert dog != cat and strip == [dog, dog, free, free, free, free, cat, cat]
    assert rows.count(strip) == STRIP
    assert rows.count([cat, free, free, dog, free, dog, free, cat]) == LINE


def test_a_layer_wider_than_the_picture_loses_no_column():
    wide = Strips("layers", 2 * STRIP_WIDTH, {}, [{"dog": [1]}, {}])
    drawn = ownership_picture([Section("title", "text", [wide], {"dog": "dog"})])
    narrow = ownership_picture(
        [
            Section(
                "title", "text", [Strips("layers", 2 * STRIP_WIDTH, {}, [{}, {}])], {"dog": "dog"}
            )
        ]
    )
    assert drawn.tobytes() != narrow.tobytes()


def test_neighbouring_colours_of_a_full_library_differ():
    names = [f"c{k}" for k in range(40)]
    strips = Strips("layers", 40, {name: (k, k + 1) for k, name in enumerate(names)})
    drawn = ownership_picture([Section("t", "t", [strips], {name: name for name in names})])
    y = drawn.height - 2 * MARGIN - STRIP
    row = [drawn.getpixel((MARGIN + int((k + 0.5) * 24), y)) for k in range(40)]
    assert all(sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 60 for a, b in pairwise(row))
    assert len(set(row)) == 40


def test_heat_grows_darker_with_the_ratio():
    shades = [sum(heat_colour(r)) for r in (0.0, 0.05, 0.3, 1.0, 2.5, 10.0, float("inf"))]
    assert shades == sorted(shades, reverse=True) and len(set(shades)) == len(shades)
    assert heat_colour(0.0) == (255, 255, 255)


def test_a_heat_map_has_a_cell_for_each_value_and_survives_many_columns():
    few = Heat("t", "text", ["a", "b"], ["a", "b"], [[None, 0.5], [2.0, None]])
    drawn = heat_picture([few])
    colours = {colour for _, colour in drawn.getcolors(1 << 16)}
    assert {heat_colour(0.5), heat_colour(2.0)} <= colours
    many = Heat("t", "text", ["g"], [f"p{k}" for k in range(182)], [[k / 60 for k in range(182)]])
    assert heat_picture([many, few]).width < 4000
