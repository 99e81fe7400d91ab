"""Tensors that stay: the same place for the same shapes, and no more of them than asked for."""

import torch

from sbora_diffusion.diffusion.drawing import Kept


def test_others_of_the_same_shapes_are_written_where_the_first_were():
    kept = Kept()
    first = kept.put([torch.ones(2, 3), torch.zeros(1)])
    again = kept.put([torch.full((2, 3), 5.0), torch.ones(1)])
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert first[0].eq(5).all() and first[1].item() == 1


def test_expanded_weights_get_room_for_each_row_and_the_oldest_goes_first():
    kept, weight = Kept(1), torch.ones(4, 3)
    (room,) = kept.room([weight.expand(2, -1, -1)])
    assert room.is_contiguous() and room.shape == (2, 4, 3) and kept.nbytes == 2 * weight.nbytes
    assert kept.room([weight.expand(2, -1, -1)])[0] is room
    (other,) = kept.room([weight.expand(3, -1, -1)])
    assert kept.nbytes == other.nbytes == 3 * weight.nbytes
    assert kept.room([weight.expand(2, -1, -1)])[0] is not room
