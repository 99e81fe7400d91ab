"""Multi-concept customization of text-to-image models with SBoRA (arXiv 2407.05413)."""

from sbora_diffusion.registration import register_with_peft

__version__ = "0.1.0"

register_with_peft()
