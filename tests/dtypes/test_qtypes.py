"""Quantized types: their fields, the names a user may write, and what a wrong name is answered."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch

from requanto import qfloat8, qfloat8_e4m3fn, qfloat8_e4m3fnuz, qfloat8_e5m2, qint2, qint4, qint8, qtype, qtypes
from requanto.dtypes.qtypes import resolve_qtype, short_name

# name, float?, bits, dtype of a code, smallest, largest: written out from optimum-quanto 0.2.7 and the OCP fp8 paper
FIELDS = [
    ("qint2", False, 2, torch.int8, -2, 1),
    ("qint4", False, 4, torch.int8, -8, 7),
    ("qint8", False, 8, torch.int8, -128, 127),
    ("qfloat8_e4m3fn", True, 8, torch.float8_e4m3fn, -448.0, 448.0),
    ("qfloat8_e4m3fnuz", True, 8, torch.float8_e4m3fnuz, -240.0, 240.0),
    ("qfloat8_e5m2", True, 8, torch.float8_e5m2, -57344.0, 57344.0),
]


@pytest.mark.parametrize(("name", "is_float", "bits", "dtype", "qmin", "qmax"), FIELDS)
def test_fields(name, is_float, bits, dtype, qmin, qmax):
    kind = qtypes[name]
    assert (kind.name, kind.is_floating_point, kind.bits, kind.dtype) == (name, is_float, bits, dtype)
    assert (kind.qmin, kind.qmax) == (qmin, qmax)
    assert kind.is_packed == (bits < 8)
    assert kind.storage_dtype == (torch.uint8 if bits < 8 else dtype)


def test_the_table_holds_these_types_and_the_alias():
    small_floats = {name for name in qtypes if re.fullmatch(r"qfp[3-7]_e[1-4]m[0-5]", name)}
    assert len(small_floats) == 2 + 3 + 4 + 4 + 4
    others = {f"quint{bits}" for bits in range(1, 9)} | {f"qint{bits}" for bits in (3, 5, 6, 7)}
    others |= {"qnf2", "qnf3", "qnf4", "qfp4", "qcodebook2", "qcodebook3", "qcodebook4"}
    others |= {"qnvfp4", "qmxfp4", "qmxfp6_e2m3", "qmxfp6_e3m2", "qmxfp8_e4m3", "qmxfp8_e5m2"}
    assert set(qtypes) == {row[0] for row in FIELDS} | {"qfloat8"} | others | small_floats
    assert qtypes["qfloat8"] is qfloat8 is qfloat8_e4m3fn


def test_code_of_zero():
    assert (qint2.zero_code, qint4.zero_code, qint8.zero_code, qfloat8.zero_code) == (2, 8, 0, 0)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("int8", qint8),
        ("INT8", qint8),
        ("qint8", qint8),
        ("int4", qint4),
        ("int2", qint2),
        ("float8", qfloat8_e4m3fn),
        ("qfloat8", qfloat8_e4m3fn),
        ("fp8", qfloat8_e4m3fn),
        ("float8_e4m3fn", qfloat8_e4m3fn),
        ("fp8_e5m2", qfloat8_e5m2),
        ("float8_e5m2", qfloat8_e5m2),
        ("float8_e4m3fnuz", qfloat8_e4m3fnuz),
        (torch.int8, qint8),
        (torch.float8_e5m2, qfloat8_e5m2),
        (torch.float8_e4m3fn, qfloat8_e4m3fn),
        (qint2, qint2),
    ],
)
def test_what_a_user_may_write(written, meant):
    assert resolve_qtype(written) is meant


def test_an_unknown_name_is_answered_with_the_nearest_and_all_known():
    with pytest.raises(ValueError, match=r"'int9'.*did you mean 'int\d'\?.*Known: .*float8.*int2.*int4.*int8"):
        resolve_qtype("int9")
    with pytest.raises(ValueError, match="'flaot8'; did you mean 'float8'"):
        resolve_qtype("flaot8")
    with pytest.raises(ValueError, match="unknown quantized type 'bfloat16'"):
        resolve_qtype(torch.bfloat16)


@pytest.mark.parametrize("value", [8, 4.0, None, ["int8"], True])
def test_a_value_of_another_kind_is_a_type_error(value):
    with pytest.raises(TypeError, match=f"string or a qtype, found {type(value).__name__}"):
        resolve_qtype(value)


@pytest.mark.parametrize("name", [row[0] for row in FIELDS])
def test_short_name_leads_back(name):
    kind = qtypes[name]
    assert not short_name(kind).startswith("q")
    assert resolve_qtype(short_name(kind)) is kind


def test_short_name_of_the_default_float8_is_the_one_users_write():
    assert (short_name(qfloat8_e4m3fn), short_name(qfloat8_e5m2), short_name(qint4)) == (
        "float8",
        "float8_e5m2",
        "int4",
    )


def test_types_are_constants():
    assert copy.deepcopy(qint4) is qint4
    assert copy.copy(qint4) is qint4
    assert pickle.loads(pickle.dumps(qint4)) == qint4
    assert len({qint2, qint4, qint8, qfloat8, qfloat8_e4m3fn}) == 4
    assert str(qint8) == "quanto.qint8"
    with pytest.raises(dataclasses.FrozenInstanceError):
        qint8.bits = 4
    assert isinstance(qint8, qtype)
