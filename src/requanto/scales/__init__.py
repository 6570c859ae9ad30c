"""Choosing scales and shifts, and quantizing with them."""

from requanto.scales.groups import default_group_size, fit_group_size
from requanto.scales.search import CALIBRATED, SEARCHES, check_method
from requanto.scales.weights import quantize_weight_data

__all__ = ["CALIBRATED", "SEARCHES", "check_method", "default_group_size", "fit_group_size", "quantize_weight_data"]
