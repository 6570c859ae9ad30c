"""What KVSettings takes and refuses."""

import pytest
import torch

import requanto
from requanto.kv import KVSettings


@pytest.mark.parametrize("kind", ["int8", "qint4", requanto.qint2, torch.float8_e4m3fn, "fp8", None])
def test_types(kind):
    settings = KVSettings(kind, kind)
    assert (settings.key_codec() is None) == (kind is None) == (settings.value_codec() is None)
    assert KVSettings(settings.keys, settings.values) == settings


def test_text():
    assert str(KVSettings("int8", None, window=3)) == "keys=int8, values=float, window=3, block=64, group=64"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"keys": "int5"}, ValueError, "keys of a KV cache can be int8, int4, int2, float8, float8_e5m2 or None"),
        ({"values": "nf4"}, ValueError, "values of a KV cache can be"),
        ({"keys": "in8"}, ValueError, "did you mean 'int8'"),
        ({"keys": 8}, TypeError, "a string or a qtype, found int: 8"),
        ({"window": -1}, ValueError, "window of a KV cache must be 0 or more, found -1"),
        ({"block": 0}, ValueError, "block of a KV cache must be 1 or more, found 0"),
        ({"group": 0}, ValueError, "group of a KV cache must be 1 or more"),
        ({"window": 1.5}, TypeError, "window of a KV cache is a number of tokens or channels, found 1.5"),
        ({"block": True}, TypeError, "block of a KV cache is a number"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error) as found:
        KVSettings(**arguments)
    assert words in str(found.value)
