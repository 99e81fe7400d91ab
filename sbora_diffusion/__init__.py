"""Multi-concept customization of text-to-image models with SBoRA (arXiv 2407.05413)."""

__version__ = "0.1.0"
