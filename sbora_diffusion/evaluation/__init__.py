"""How alike are pictures and texts? Feature extractors and metrics; knows no diffusion model."""
