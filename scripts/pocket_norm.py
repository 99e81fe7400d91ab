"""Group normalisation that stays quick where the channels lie next to each other in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelSums(nn.GroupNorm):
    """`nn.GroupNorm` by way of the sums of each channel.

    A group of a few channels is scattered over the whole picture in channels-last memory; sums
    over places, channel by channel, read it in order, and the groups are made from these.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape, in autocast's type where that is on."""
        if x.ndim != 4:
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        wide = x.float()
        mean, square = self._by_group(wide.mean((2, 3))), self._by_group(wide.square().mean((2, 3)))
        gain = torch.rsqrt((square - mean * mean).clamp_min(0) + self.eps) * self.weight
        out = wide * gain[:, :, None, None] + (self.bias - mean * gain)[:, :, None, None]
        kind = x.device.type
        return out.to(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        )

    def _by_group(self, values: Tensor) -> Tensor:
        """(B, C) → (B, C), the mean of each channel's group."""
        grouped = values.unflatten(1, (self.num_groups, -1))
        return grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)


def use_channel_sums(model: nn.Module) -> None:
    """Let all group normalisations of a model compute so; parameters and names stay."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = ChannelSums
