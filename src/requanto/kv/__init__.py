"""Quantized keys and values of attention: a codec, a buffer that grows, one of fixed size. Imports no model library."""

from requanto.kv.codec import Codec, Coded
from requanto.kv.fixed import Fixed
from requanto.kv.growing import Growing
from requanto.kv.settings import KVSettings

__all__ = ["Codec", "Coded", "Fixed", "Growing", "KVSettings"]
