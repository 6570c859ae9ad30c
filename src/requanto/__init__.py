"""Requanto: quantized weights for Transformers and Diffusers."""

__version__ = "0.1.0"
