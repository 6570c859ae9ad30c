"""Whole models, in place: quantize, freeze, calibrate, requantize."""
