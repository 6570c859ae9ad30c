"""Functions that change whole models in place: quantize, freeze, calibrate, requantize."""
