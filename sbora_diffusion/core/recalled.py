"""Layer norms' outputs, computed again where a backward pass asks for them.

FB's gradient needs the layer's input, often a layer norm's output. A frozen layer norm keeps its
own input for its gradient, so that keeping the output too can be spared at the cost of a kernel:
the same operation on the same tensor gives the same bytes.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MARK = "_sbora_origin"


class Recall:
    """A layer norm's output, computed once for all layers that read it and then forgotten."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._shape, self._eps = norm.normalized_shape, norm.eps
        self._readers = self._waiting = 0
        self._output: Tensor | None = None

    def add_reader(self) -> None:
        """Called once by each that will ask for the output once in a backward pass."""
        self._readers += 1

    def output(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The output for the norm's input, weight and bias."""
        if self._output is None:
            self._output = F.layer_norm(x, self._shape, weight, bias, self._eps)
            self._waiting = self._readers
        output = self._output
        self._waiting -= 1
        if self._waiting == 0:
            self._output = None
        return output


class Origin:
    """Where a layer norm's output comes from; stays with it as an attribute.

    Attributes:
        inputs: the norm's input, weight and bias, to be saved for the backward pass.
    """

    def __init__(self, norm: nn.LayerNorm, x: Tensor, output: Tensor) -> None:
        self.recall = Recall(norm)
        self.inputs = x.detach(), norm.weight, norm.bias
        self._version = output._version

    def holds(self, output: Tensor) -> bool:
        """Whether the output was not changed in place since."""
        return output._version == self._version


def origin_of(x: Tensor) -> Origin | None:
    """What `x` can be computed again from; None if it has to be kept itself."""
    if torch.compiler.is_compiling():
        return None  # the compiler decides by itself what to compute again
    origin: Origin | None = getattr(x, _MARK, None)
    return origin if origin is not None and origin.holds(x) else None


def plain_norms(model: nn.Module) -> list[nn.LayerNorm]:
    """The layer norms in a model whose outputs can be computed again."""
    return [m for m in model.modules() if type(m) is nn.LayerNorm and "forward" not in vars(m)]


@contextmanager
def recalled_norms(norms: Iterable[nn.LayerNorm]) -> Iterator[None]:
    """Within, the norms mark their outputs for `origin_of`, by a hook."""
    with ExitStack() as stack:
        for norm in norms:
            stack.callback(norm.register_forward_hook(_mark).remove)
        yield


def _mark(norm: Any, args: tuple[Any, ...], output: Tensor) -> None:
    # Without a gradient of its own, the norm does not keep its input.
    if torch.compiler.is_compiling() or not output.requires_grad or len(args) != 1:
        return
    tensors = [*args, *norm.parameters()]
    if all(tensor.dtype == output.dtype for tensor in tensors):  # else autocast has cast some
        setattr(output, _MARK, Origin(norm, args[0], output))
