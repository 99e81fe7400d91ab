"""Concepts on Stable Diffusion: train, attach, merge, generate. The only package on diffusers."""
