import sqlite3
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbora_diffusion.core.errors import CapacityError, ConfigError, FormatError, ResourceError
from sbora_diffusion.library import Library, default_path

BASE = "pocket-1"


def wide(width: int) -> dict[str, int]:
    """Two layers, the narrower one of that width."""
    return {"unet.wider": width + 40, "unet.narrow": width}


@pytest.fixture
def library(tmp_path) -> Library:
    return Library(tmp_path / "data" / "library.sqlite3")


def ranges(library: Library, variant: str = "fa") -> list[tuple[int, int]]:
    return [(e.start, e.stop) for e in library.concepts(BASE) if e.variant == variant]


def assert_disjoint(found: list[tuple[int, int]]) -> None:
    owned = [index for first, last in found for index in range(first, last)]
    assert len(owned) == len(set(owned))


def test_concepts_get_the_slots_in_order(library):
    got = [library.reserve(BASE, "fa", name, 8, wide(160)) for name in ("dog", "cat", "robot")]
    assert [(r.start, r.stop, r.slot, r.registered) for r in got] == [
        (0, 8, 0, True),
        (8, 16, 1, True),
        (16, 24, 2, True),
    ]


def test_a_concept_trained_again_keeps_its_range_and_its_file(library):
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    first = library.reserve(BASE, "fa", "cat", 8, wide(160))
    library.record(BASE, "fa", "cat", "cat.safetensors", "d" * 64, "<cat>")
    assert library.reserve(BASE, "fa", "cat", 8, wide(160)) == first
    assert library.concepts(BASE)[1].digest == "d" * 64


def test_a_removed_range_is_used_again(library):
    for name in ("dog", "cat", "robot"):
        library.reserve(BASE, "fa", name, 8, wide(160))
    assert library.remove("cat").slot == 1
    assert library.reserve(BASE, "fa", "owl", 8, wide(160)).slot == 1


def test_variants_and_bases_have_ranges_of_their_own(library):
    for base, variant in ((BASE, "fa"), (BASE, "fb"), ("sd1", "fa")):
        assert library.reserve(base, variant, "dog", 8, wide(160)).start == 0


def test_ranks_side_by_side_stay_aligned_and_disjoint(library):
    got = [
        library.reserve(BASE, "fa", name, rank, wide(160))
        for name, rank in (("a", 4), ("b", 8), ("c", 4), ("d", 8), ("e", 4))
    ]
    assert [(r.start, r.stop) for r in got] == [(0, 4), (8, 16), (4, 8), (16, 24), (24, 28)]
    assert [r.slot for r in got] == [0, 1, 1, 2, 6]


def test_another_rank_gets_a_new_range_and_frees_the_old_one(library):
    library.reserve(BASE, "fa", "dog", 4, wide(160))
    library.reserve(BASE, "fa", "cat", 4, wide(160))
    library.record(BASE, "fa", "dog", "dog.safetensors", "d" * 64, "<dog>")
    assert library.reserve(BASE, "fa", "dog", 8, wide(160)).start == 8
    assert library.reserve(BASE, "fa", "owl", 4, wide(160)).start == 0
    dog = next(entry for entry in library.concepts() if entry.name == "dog")
    assert (dog.path, dog.digest, dog.token) == (None, None, None)


def test_a_concept_may_grow_into_its_own_old_range(library):
    library.reserve(BASE, "fa", "dog", 4, wide(8))
    assert library.reserve(BASE, "fa", "dog", 8, wide(8)).start == 0


def test_an_explicit_free_slot_is_registered(library):
    assert library.reserve(BASE, "fa", "dog", 8, wide(160), slot=5).registered
    assert ranges(library) == [(40, 48)]
    assert library.reserve(BASE, "fa", "cat", 8, wide(160)).slot == 0


@pytest.mark.parametrize(("rank", "slot"), [(8, 1), (4, 2), (4, 3), (16, 0)])
def test_an_explicit_slot_of_another_concept_is_given_but_not_registered(library, rank, slot):
    library.reserve(BASE, "fa", "dog", 8, wide(160), slot=1)
    got = library.reserve(BASE, "fa", "cat", rank, wide(160), slot=slot)
    assert (got.start, got.stop, got.registered) == (slot * rank, (slot + 1) * rank, False)
    assert [entry.name for entry in library.concepts()] == ["dog"]


def test_a_clashing_slot_leaves_the_concepts_own_registration_alone(library):
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    own = library.reserve(BASE, "fa", "cat", 8, wide(160))
    assert not library.reserve(BASE, "fa", "cat", 8, wide(160), slot=0).registered
    assert library.reserve(BASE, "fa", "cat", 8, wide(160)) == own


def test_a_full_layer_says_rank_width_and_how_many_fit(library):
    for k in range(20):
        library.reserve(BASE, "fa", f"c{k}", 8, wide(164))
    before = library.concepts()
    with pytest.raises(
        CapacityError, match=r"'unet.narrow', is 164 wide and holds 20 concepts of rank 8"
    ):
        library.reserve(BASE, "fa", "one_more", 8, wide(164))
    with pytest.raises(CapacityError):
        library.reserve(BASE, "fa", "c3", 16, wide(164))
    assert library.concepts() == before
    assert library.reserve(BASE, "fa", "small", 4, wide(164)).start == 160


@pytest.mark.parametrize(("rank", "slot"), [(8, 20), (200, None), (8, 10**30)])
def test_what_is_beyond_the_layer_is_a_capacity_error(library, rank, slot):
    with pytest.raises(CapacityError, match="160 wide"):
        library.reserve(BASE, "fa", "dog", rank, wide(160), slot=slot)


def test_a_narrower_layer_moves_a_concept_whose_range_no_longer_fits(library):
    library.reserve(BASE, "fa", "dog", 8, wide(160), slot=19)
    assert library.reserve(BASE, "fa", "dog", 8, wide(80)).slot == 0


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdef"),
            st.sampled_from([0, 1, 3, 4, 8]),  # 0 removes the concept
            st.none() | st.integers(0, 12),
        ),
        max_size=25,
    )
)
def test_any_sequence_of_operations_keeps_the_ranges_disjoint_and_aligned(
    tmp_path_factory, operations
):
    library = Library(tmp_path_factory.mktemp("library") / "l.sqlite3")
    for name, rank, slot in operations:
        try:
            if rank:
                got = library.reserve(BASE, "fa", name, rank, wide(32), slot)
                assert got.start == got.slot * rank and got.stop <= 32
            else:
                library.remove(name)
        except (CapacityError, ConfigError):
            continue
    assert_disjoint(ranges(library))


def test_record_notes_the_file_under_its_absolute_path(library, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library.reserve(BASE, "fb", "dog", 8, wide(160))
    library.record(BASE, "fb", "dog", "dog.safetensors", "a" * 64, "<dog>")
    (entry,) = library.concepts()
    assert entry.path == str(tmp_path / "dog.safetensors")
    assert (entry.rank, entry.slot, entry.digest, entry.token) == (8, 0, "a" * 64, "<dog>")


def test_recording_without_a_reservation_is_refused(library):
    with pytest.raises(ConfigError, match="dog"):
        library.record(BASE, "fa", "dog", "dog.safetensors", "a" * 64, None)


def test_removing_needs_a_name_that_is_known_and_unambiguous(library):
    for variant in ("fa", "fb"):
        library.reserve(BASE, variant, "dog", 8, wide(160))
    with pytest.raises(ConfigError, match="cat"):
        library.remove("cat")
    with pytest.raises(ConfigError, match=f"{BASE}/fa, {BASE}/fb"):
        library.remove("dog")
    library.remove("dog", variant="fb")
    assert [entry.variant for entry in library.concepts()] == ["fa"]


def test_listing_a_library_that_does_not_exist_creates_nothing(library):
    assert library.concepts() == []
    assert not library.path.parent.exists()


def test_names_are_data_and_not_sql(library):
    name = "x'; DROP TABLE concepts; --"
    library.reserve(BASE, "fa", name, 8, wide(160))
    assert library.remove(name).name == name


@pytest.mark.parametrize(
    "arguments",
    [
        {"variant": "lora"},
        {"name": ""},
        {"rank": 0},
        {"slot": -1},
    ],
)
def test_a_request_that_makes_no_sense_is_a_config_error(library, arguments):
    request = {"base": BASE, "variant": "fa", "name": "dog", "rank": 8, "widths": wide(160)}
    with pytest.raises(ConfigError):
        library.reserve(**(request | arguments))
    assert library.concepts() == []


def test_a_file_that_is_no_library_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to have a header\n" * 20)
    foreign = tmp_path / "other.sqlite3"
    with sqlite3.connect(foreign) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    for path in (text, foreign):
        before = path.read_bytes()
        for operation in (
            lambda path=path: Library(path).reserve(BASE, "fa", "dog", 8, wide(160)),
            lambda path=path: Library(path).concepts(),
        ):
            with pytest.raises(FormatError, match=path.name):
                operation()
        assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "library.sqlite3", tmp_path):
        with pytest.raises(ResourceError) as caught:
            Library(path).reserve(BASE, "fa", "dog", 8, wide(160))
        assert "SBORA_LIBRARY" in str(caught.value) and "\n" not in str(caught.value)


def test_a_library_locked_by_somebody_else_is_a_resource_error(library, monkeypatch):
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    monkeypatch.setattr("sbora_diffusion.library_file.BUSY_SECONDS", 0.05)
    other = sqlite3.connect(library.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(ResourceError, match="locked"):
        library.reserve(BASE, "fa", "cat", 8, wide(160))
    other.execute("ROLLBACK")
    other.close()


def test_the_library_knows_the_widths_of_all_layers_that_were_adapted(library):
    assert library.layers(BASE, "fa") == {}
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    library.reserve(BASE, "fa", "cat", 8, {"text_encoder.k": 192})
    assert library.layers(BASE, "fa") == {**wide(160), "text_encoder.k": 192}
    assert library.layers(BASE, "fb") == library.layers("other", "fa") == {}


def test_a_library_of_an_older_version_gets_the_table_that_it_lacks(library):
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    with closing(sqlite3.connect(library.path)) as database:
        database.execute("DROP TABLE layers")
    assert [entry.name for entry in library.concepts()] == ["dog"]
    assert library.layers(BASE, "fa") == {}
    assert library.reserve(BASE, "fa", "cat", 8, wide(160)).slot == 1


def test_changes_together_are_all_made_or_none_of_them(library):
    library.reserve(BASE, "fa", "dog", 8, wide(160))
    before = library.concepts()

    def change(joined: Library) -> None:
        joined.remove("dog")
        assert joined.reserve(BASE, "fa", "cat", 8, wide(160)).slot == 0
        joined.record(BASE, "fa", "cat", "cat.safetensors", "d" * 64, "<cat>")
        assert [entry.token for entry in joined.concepts()] == ["<cat>"]

    with pytest.raises(CapacityError), library.together() as joined:
        change(joined)
        joined.reserve(BASE, "fa", "whale", 1000, wide(160))
    assert library.concepts() == before
    with library.together() as joined:
        change(joined)
    assert [entry.name for entry in library.concepts()] == ["cat"]


def test_others_wait_for_changes_made_together(library, monkeypatch):
    monkeypatch.setattr("sbora_diffusion.library_file.BUSY_SECONDS", 0.05)
    with library.together() as joined:
        joined.reserve(BASE, "fa", "dog", 8, wide(160))
        with pytest.raises(ResourceError, match="locked"):
            library.reserve(BASE, "fa", "cat", 8, wide(160))
    assert library.reserve(BASE, "fa", "cat", 8, wide(160)).slot == 1


def test_default_path_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SBORA_LIBRARY", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_path() == tmp_path / ".local" / "share" / "sbora" / "library.sqlite3"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_path() == tmp_path / "data" / "sbora" / "library.sqlite3"
    monkeypatch.setenv("SBORA_LIBRARY", str(tmp_path / "mine.sqlite3"))
    assert Library().path == tmp_path / "mine.sqlite3"
