import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbora_diffusion.core.allocation import (
    MAX_WIDTH,
    capacity,
    check_capacity,
    indices_for,
    permutation,
    slot_range,
)
from sbora_diffusion.core.errors import CapacityError, ConfigError

TO_K = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
Q_PROJ = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"

layers = st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9_]{1,8}){0,3}", fullmatch=True)
seeds = st.integers(0, 2**64 - 1)


def naive_permutation(layer: str, width: int, seed: int) -> list[int]:
    """Straight from the module's docstring, one digest at a time."""
    digests = b"".join(
        hashlib.sha256(
            b"sbora-allocation-1\0"
            + bytes(seed >> 8 * k & 255 for k in range(8))
            + layer.encode()
            + b"\0"
            + bytes(counter >> 8 * k & 255 for k in range(8))
        ).digest()
        for counter in range(width + 8)
    )
    position, order = 0, list(range(width))
    for i in reversed(range(1, width)):
        bound = i + 1
        while True:
            chunk = digests[position : position + 8]
            word = sum(byte << 8 * k for k, byte in enumerate(chunk))
            position += 8
            if word < bound * (2**64 // bound):
                break
        j = word % bound
        order[i], order[j] = order[j], order[i]
    return order


@pytest.mark.parametrize(
    ("layer", "width", "seed", "expected"),
    [
        (TO_K, 16, 0, (8, 10, 11, 9, 0, 4, 13, 2, 5, 7, 12, 3, 6, 14, 15, 1)),
        (Q_PROJ, 16, 0, (3, 11, 0, 4, 15, 13, 10, 14, 12, 1, 7, 9, 8, 6, 5, 2)),
        ("a", 10, 2**64 - 1, (7, 2, 3, 1, 9, 6, 0, 8, 4, 5)),
        ("a", 1, 0, (0,)),
    ],
)
def test_permutation_matches_the_golden_vectors(layer, width, seed, expected):
    assert permutation(layer, width, seed) == expected


def test_indices_match_the_golden_vector_of_a_real_width():
    assert indices_for(TO_K, 320, 8, 16, 7).tolist() == [17, 88, 131, 149, 176, 248, 261, 281]
    whole = hashlib.sha256(json.dumps(permutation(TO_K, 1280, 0)).encode()).hexdigest()
    assert whole[:16] == "8f77383802048b89"


@settings(max_examples=40, deadline=None)
@given(layers, st.integers(1, 200), seeds)
def test_permutation_equals_a_naive_reading_of_the_docstring(layer, width, seed):
    assert list(permutation(layer, width, seed)) == naive_permutation(layer, width, seed)


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(1, 400), seeds, st.data())
def test_all_slots_together_cover_every_index_once(layer, width, seed, data):
    rank = data.draw(st.integers(1, width))
    full = [slot_range(slot, rank) for slot in range(width // rank)]
    rest = [(width - width % rank, width)] if width % rank else []
    owned = [i for r in full + rest for i in indices_for(layer, width, *r, seed).tolist()]
    assert sorted(owned) == list(range(width))


@settings(max_examples=60, deadline=None)
@given(layers, st.integers(2, 400), seeds, st.data())
def test_ranges_of_different_ranks_that_do_not_meet_share_no_index(layer, width, seed, data):
    cuts = data.draw(st.lists(st.integers(0, width), min_size=3, max_size=8, unique=True))
    cuts.sort()
    owned = [
        set(indices_for(layer, width, *part, seed).tolist()) for part in itertools.pairwise(cuts)
    ]
    assert sum(map(len, owned)) == len(set().union(*owned)) == cuts[-1] - cuts[0]


def test_indices_are_ascending_int32_and_a_fresh_tensor_each_time():
    first = indices_for(TO_K, 320, 0, 8, 0)
    assert first.dtype == torch.int32
    assert first.shape == (8,)
    assert (first.diff() > 0).all()
    expected = first.clone()
    first.zero_()
    assert torch.equal(indices_for(TO_K, 320, 0, 8, 0), expected)


def test_layers_and_seeds_get_different_permutations():
    drawn = {permutation(name, 160, seed) for name in (TO_K, Q_PROJ) for seed in (0, 1)}
    assert len(drawn) == 4


def test_every_position_is_equally_likely():
    """Chi-square over where index 0 lands: 2000 layers, 10 places, 9 degrees of freedom."""
    places = [permutation(f"layer.{k}", 10, 0).index(0) for k in range(2000)]
    chi_square = sum((places.count(place) - 200) ** 2 / 200 for place in range(10))
    assert chi_square < 27.9  # 99.9 % quantile


def test_processes_agree_whatever_hash_seed_and_order_of_layers():
    program = (
        "import json, sys\n"
        "from sbora_diffusion.core.allocation import indices_for\n"
        "names = sys.argv[1:]\n"
        "found = {n: indices_for(n, 192, 8, 16, 5).tolist() for n in names}\n"
        "print(json.dumps(found, sort_keys=True))\n"
    )
    names = [TO_K, Q_PROJ, "unet.a", "unet.b"]
    here = {name: indices_for(name, 192, 8, 16, 5).tolist() for name in names}
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, *names[::-1]],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(elsewhere) == here


def test_capacity_is_set_by_the_narrowest_layer():
    widths = {"wide": 1280, "narrow": 320, "middle": 640}
    assert [capacity(widths, rank) for rank in (4, 8, 16, 32, 64)] == [80, 40, 20, 10, 5]
    assert capacity(widths, 321) == 0


def test_the_last_slot_fits_and_the_next_one_names_layer_width_rank_and_how_many_fit():
    widths = {"unet.wide": 640, "unet.narrow": 164}
    check_capacity(widths, *slot_range(19, 8))
    for refused in (
        lambda: check_capacity(widths, *slot_range(20, 8)),
        lambda: indices_for("unet.narrow", 164, *slot_range(20, 8), 0),
    ):
        with pytest.raises(CapacityError) as caught:
            refused()
        message = str(caught.value)
        for part in ("unet.narrow", "164 wide", "rank 8", "20 concepts"):
            assert part in message
        assert "\n" not in message


@pytest.mark.parametrize(
    "call",
    [
        lambda: indices_for("a", 16, 4, 4, 0),
        lambda: indices_for("a", 16, -1, 4, 0),
        lambda: indices_for("a", 0, 0, 4, 0),
        lambda: indices_for("a", MAX_WIDTH + 1, 0, 4, 0),
        lambda: indices_for("", 16, 0, 4, 0),
        lambda: indices_for("a\0b", 16, 0, 4, 0),
        lambda: indices_for("ä", 16, 0, 4, 0),
        lambda: indices_for("a", 16, 0, 4, -1),
        lambda: indices_for("a", 16, 0, 4, 2**64),
        lambda: slot_range(-1, 8),
        lambda: slot_range(0, 0),
        lambda: capacity({}, 8),
        lambda: capacity({"a": 16}, 0),
        lambda: check_capacity({}, 0, 8),
    ],
)
def test_nonsense_is_a_config_error(call):
    with pytest.raises(ConfigError):
        call()
