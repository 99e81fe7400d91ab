"""Layers whose input rows belong to different concepts, for the length of a block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.core.mixed import Bank, branch_rows, join_rows
from sbora_diffusion.core.mixed_weights import linear_rows, serves


@contextmanager
def mixed_rows(
    layers: Mapping[str, nn.Module],
    banks: Mapping[str, Sequence[Bank]],
    rows: Tensor | None = None,
    steady: bool = True,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> Iterator[None]:
    """Within, each row of a batch gets the update of its own concept, on top of the layer's output.

    The layers stay what they are, adapted or plain: hooks do it, which leave nothing behind and
    need no adapters that would have to be put in and taken out concept by concept. Hooks cannot
    take the place of the layer's own product: a layer with folded weights gets another `forward`
    meanwhile.

    Args:
        layers: canonical name → layer (..., in) → (..., out).
        banks: canonical name → banks, at most one for each variant; layers that are not named stay
            as they are.
        rows: (B,), int64, the entry of each row, −1 for none. A batch of n · B rows is n such
            batches one after another, as guidance makes them. Without it consecutive rows share an
            entry, see `sbora_rows`.
        steady: banks and rows stay what they are, so that without gradients each row's own part is
            gathered once, not in each call.
        weights: canonical name → `folded_weights` of these banks and rows, for calls without
            gradients that have enough tokens; all others take two paths.
    """
    with ExitStack() as hooks:
        for name, parts in banks.items():
            layer = layers[name]
            if name in weights:
                assert isinstance(layer, nn.Linear)
                folded = _Folded(parts, rows, steady, layer, weights[name])
                hooks.enter_context(_replaced(layer, folded.forward))
                continue
            mixed = _Mixed(parts, rows, steady)
            hooks.enter_context(_removed(layer.register_forward_pre_hook(mixed.before)))
            hooks.enter_context(_removed(layer.register_forward_hook(mixed.after)))
        yield


def mixed_tensors(layer: nn.Module) -> list[Tensor] | None:
    """All that the rows' updates of a layer are computed from; None if it has other hooks."""
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    if not all(isinstance(owner, _Mixed) for owner in owners):
        return None
    owners.append(getattr(vars(layer).get("forward"), "__self__", None))
    return [tensor for owner in owners if isinstance(owner, _Mixed) for tensor in owner.tensors()]


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another `forward` for a layer that has only its class's."""
    assert "forward" not in vars(layer)
    setattr(layer, "forward", forward)  # noqa: B010
    try:
        yield
    finally:
        del layer.forward


class _Mixed:
    """The second path of one layer."""

    def __init__(self, banks: Sequence[Bank], rows: Tensor | None, steady: bool) -> None:
        self._banks, self._rows, self._steady = banks, rows, steady
        self._selected: dict[int, list[Bank]] = {}
        self._open: list[tuple[Bank, Tensor]] = []

    def tensors(self) -> list[Tensor]:
        banks = [t for bank in self._banks for t in (bank.factor, bank.indices, bank.scale)]
        return banks if self._rows is None else [*banks, self._rows]

    def before(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *others = inputs
        self._open = []
        for bank in self._for_rows(len(x)):
            x, part = branch_rows(x, bank)
            self._open.append((bank, part))
        return (x, *others)

    def after(self, _layer: nn.Module, _inputs: tuple[Any, ...], y: Tensor) -> Tensor:
        opened, self._open = self._open, []
        for bank, part in opened:
            y = join_rows(y, part, bank)
        return y

    def _for_rows(self, count: int) -> Sequence[Bank]:
        """The banks with one entry for each of `count` rows."""
        if self._rows is None:
            return self._banks
        keep = self._steady and not torch.is_grad_enabled()
        if keep and count in self._selected:
            return self._selected[count]
        rows = self._rows.repeat(self._halves(count))
        selected = [bank.select(rows) for bank in self._banks]
        if keep:
            self._selected[count] = selected
        return selected

    def _halves(self, count: int) -> int:
        """How many batches of the same concepts stand one after another in `count` rows."""
        if self._rows is None:
            return 1
        assert count % len(self._rows) == 0, f"{count} rows, {len(self._rows)} have their concept"
        return count // len(self._rows)


class _Folded(_Mixed):
    """One product for a plain layer and the rows' updates, or both paths."""

    def __init__(
        self,
        banks: Sequence[Bank],
        rows: Tensor | None,
        steady: bool,
        layer: nn.Linear,
        weights: Tensor,
    ) -> None:
        super().__init__(banks, rows, steady)
        self._layer, self._weights = layer, weights

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self._weights]

    def forward(self, x: Tensor) -> Tensor:
        halves = self._halves(len(x))
        if serves(self._weights, x, halves):
            return linear_rows(x, self._weights, self._layer.bias, halves)
        inputs = self.before(self._layer, (x,))
        return self.after(self._layer, inputs, nn.Linear.forward(self._layer, *inputs))
