"""Multi-concept customization of text-to-image models with SBoRA (arXiv 2407.05413)."""

from typing import TYPE_CHECKING, Any

from sbora_diffusion.registration import register_with_peft

if TYPE_CHECKING:
    from sbora_diffusion.diffusion.loading import load_sbora as load_sbora

__version__ = "0.1.0"
__all__ = ["__version__", "load_sbora"]


def __getattr__(name: str) -> Any:
    """`load_sbora` on first use: it needs diffusers, which takes seconds to import."""
    if name != "load_sbora":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sbora_diffusion.diffusion.loading import load_sbora

    return load_sbora


register_with_peft()
