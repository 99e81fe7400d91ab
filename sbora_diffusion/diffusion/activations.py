"""What goes into the adapted layers while the model draws a concept's own prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sbora_diffusion.core.concept import Concept


@contextmanager
def watched(layers: Mapping[str, nn.Linear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within, `see(name, x)` gets the input (..., in) of each layer whenever it runs."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, inputs: see(name, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def own_prompts(concept: Concept, prompts: Sequence[str]) -> list[str]:
    """Prompts with the concept's tokens, or its class noun if it has none, in the place of {}."""
    words = " ".join(entry.token for entry in concept.meta.tokens) or concept.meta.class_noun
    return [prompt.replace("{}", words) for prompt in prompts]
