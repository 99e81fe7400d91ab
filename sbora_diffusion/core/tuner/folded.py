"""The folded form of a layer in training: its trained columns or rows live in the base weight.

The factor stays the parameter, in fp32; the weight holds cast(fp32(W0) + scale · factor) at the
factor's indices, the bytes that `core.merging` folds, and is rewritten after each optimizer step.
In fp16 and bf16 an increment below half a unit in the last place of W0 shows in the forward pass
only once the factor has grown.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from sbora_diffusion.core.functional import folded_linear
from sbora_diffusion.core.merging import Originals, commit, prepare, restore
from sbora_diffusion.core.rewriting import Rewrite, Rewriting
from sbora_diffusion.core.tuner.layer import SboraLinear
from sbora_diffusion.core.updates import Update


class Obstacle(StrEnum):
    """Why a layer cannot train in the folded form; it takes two paths then."""

    ABSENT = "the layer has no SBoRA adapter of this name"
    WRAPPED = "another tuner's layer is wrapped around the base layer"
    NOT_PLAIN = "the base layer is not a plain nn.Linear, or its weight is quantized or sharded"
    HOOKED = "the base layer has hooks, which the folded form would not call"
    BASE_TRAINS = "the base layer's own weight or bias is trained"
    SHARED = "several adapted layers share one base weight"
    DROPOUT = "the adapter has dropout"
    DISABLED = "adapters are disabled"
    NOT_ALONE = "other adapters are active or merged"
    GATED = "a gate confines the update to some tokens"


def folded_obstacle(layer: SboraLinear, adapter: str) -> Obstacle | None:
    """Why the adapter cannot live in the base weight now; None if it can."""
    if adapter not in layer.configs:
        return Obstacle.ABSENT
    if layer.configs[adapter].dropout > 0.0:
        return Obstacle.DROPOUT
    return _use_obstacle(layer, adapter) or base_obstacle(layer.base_layer)


def begin_folded(layer: SboraLinear, adapter: str) -> Obstacle | None:
    """Let an adapter live in the base weight while it trains; see `write_back` and `end_folded`.

    If an obstacle arises later, the weight is the base's own again and the layer takes two paths
    until the obstacle is gone. Each forward pass asks whether adapters were disabled, others
    activated or a gate set; each `write_back` looks at the base layer too.

    Returns:
        Why the form is not begun; None if it is.

    Raises:
        NonFiniteError: the factor is not finite; the layer is unchanged.
    """
    layer.leave_form()
    obstacle = folded_obstacle(layer, adapter)
    if obstacle is None:
        layer.form = FoldedForm(layer, adapter)
        write_back([layer])
    return obstacle


def end_folded(layer: SboraLinear) -> None:
    """Put the base's bytes back; a layer that is not in the folded form stays as it is."""
    layer.leave_form()


@torch.no_grad()
def write_back(layers: Iterable[SboraLinear], rewriting: Rewriting | None = None) -> None:
    """Rewrite the columns or rows of the adapters in training, to be called after each step.

    A forward pass does this by itself, layer by layer, for a factor that was changed in place or
    got another scale; a change by way of `factor.data` goes unseen. All layers in one call cost
    less. Layers out of the form are left alone.

    Args:
        rewriting: stays prepared for the same layers.

    Raises:
        NonFiniteError: a factor is not finite. Checked when the form takes effect, not at each
            step, where the check would wait for the device.
    """
    ready: list[FoldedForm] = []
    for form in (layer.form for layer in layers):
        if isinstance(form, FoldedForm):
            if folded_obstacle(form.layer, form.adapter) is None:
                ready.append(form)
            else:
                form.restore()
    (rewriting or Rewriting()).write([form.prepared() for form in ready])
    for form in ready:
        form.written()


class FoldedForm:
    """What one layer in the folded form remembers; a `Form`."""

    def __init__(self, layer: SboraLinear, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self._indices = layer.sbora_indices[adapter].to(torch.int64, copy=True)
        self._trained = layer.sbora_factor[adapter]
        self._originals: Originals | None = None  # none: the weight is the base's own
        self._rewrite: Rewrite | None = None
        self._place: tuple[Any, ...] = ()
        self._version = -1

    def settle(self) -> bool:
        """Bring the weight up to date; whether the form holds now."""
        if torch.compiler.is_compiling():  # what happens between the steps is not traced
            return self._originals is not None
        if _use_obstacle(self.layer, self.adapter) is not None:
            self.restore()
        elif self._place != self._place_now() or self._version != self._trained._version:
            write_back([self.layer])
        return self._originals is not None

    def output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One GEMM; without gradients a plain call of the base layer."""
        base: Any = self.layer.base_layer
        if args or kwargs or not torch.is_grad_enabled():
            return base(x, *args, **kwargs)
        # Nothing is looked up by the adapter's name: another concept's runs the same compiled code.
        weights = base.weight, base.bias
        return folded_linear(self._variant, x, self._trained, *weights, self._indices, self._scale)

    def restore(self) -> None:
        """Put the original columns or rows back, bit for bit."""
        if self._originals is not None:
            restore(self.layer.linear().weight, self._originals)
            self._originals, self._rewrite, self._place = None, None, ()

    def prepared(self) -> Rewrite:
        """What writes the factor again; folds unless that was done in this place."""
        place = self._place_now()
        if self._place != place:
            self.restore()
            self._fold()
            self._place = place
        assert self._rewrite is not None
        return self._rewrite

    def written(self) -> None:
        """Remember that the weight holds the factor as it is now."""
        self._version = self._trained._version

    def _fold(self) -> None:
        layer, name = self.layer, self.adapter
        self._indices = self._indices_now()
        self._trained = layer.sbora_factor[name]
        self._variant, self._scale = layer.configs[name].variant, layer.scale(name)
        # The update sees the factor change, and restoring reads the kept blocks alone.
        factor = self._trained.detach()
        update = Update(name, self._variant, self._indices, factor, self._scale)
        weight = layer.linear().weight
        change = prepare(weight, Originals(), [update])
        self._originals = change.originals  # first: it undoes a write that is interrupted
        commit([change])
        self._rewrite = Rewrite(weight, update, change.originals.blocks[name])

    def _indices_now(self) -> Tensor:
        """The indices as kernels take them without a cast, where they were before: a recording of
        the layer's work may read them there."""
        indices = self.layer.sbora_indices[self.adapter]
        if self._indices.device == indices.device:
            return self._indices.copy_(indices)
        return indices.to(torch.int64, copy=True)

    def _place_now(self) -> tuple[Any, ...]:
        """Where everything lies, and the scale: with these unchanged, the factor alone can be."""
        layer, name = self.layer, self.adapter
        # `nn.Module`'s way to an attribute would take most of the time.
        modules: Any = layer._modules
        weight = modules["base_layer"]._parameters.get("weight")
        if weight is None:
            return ()
        factor = modules["sbora_factor"]._parameters[name]
        indices = modules["sbora_indices"]._buffers[name]
        pointers = weight.data_ptr(), factor.data_ptr(), indices.data_ptr()
        return *pointers, id(factor), weight.dtype, indices._version, layer.scale(name)


def _use_obstacle(layer: SboraLinear, adapter: str) -> Obstacle | None:
    """What may come and go between two calls; looked at in each of them, hence cheap."""
    if layer.disable_adapters:
        return Obstacle.DISABLED
    if layer.active_adapters != [adapter] or layer.merged:
        return Obstacle.NOT_ALONE
    return Obstacle.GATED if layer.gate is not None else None


def base_obstacle(base: nn.Module) -> Obstacle | None:
    """Why another product cannot stand in for a call of the layer; None if it can."""
    if not isinstance(base, nn.Linear):
        return Obstacle.WRAPPED
    weight, bias = base.weight, base.bias
    plain = type(base).forward is nn.Linear.forward and "forward" not in vars(base)
    # Quantized and sharded weights are subclasses, of the parameter or of the tensor inside.
    if not plain or type(weight) is not nn.Parameter or type(weight.data) is not Tensor:
        return Obstacle.NOT_PLAIN
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        return Obstacle.NOT_PLAIN
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks:
        return Obstacle.HOOKED
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return Obstacle.BASE_TRAINS
    return None
