"""Arguments that do not fit: every launcher raises a ValueError that names one, before it launches anything."""

import importlib

import pytest
import torch
from reference import FP8, draw

import requanto_kernels as kernels

FULL = torch.float32
LAUNCHERS = (
    "wq_gemm",
    "wq_gemm_many",
    "wq_gemm_dx",
    "wq_gemm_grouped",
    "wq_dequant",
    "quant_rows",
    "scaled_mm",
    "int_mm",
    "w4a8_gemm",
)


class Launched(Exception):
    pass


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    def launch(kernel, *args, **kwargs):
        raise Launched(kernel)

    for name in LAUNCHERS:
        module = importlib.import_module(f"requanto_kernels.{name}")
        assert module.launch is not launch
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(torch, "_int_mm", launch)


def arguments(name, kind="4", affine=True):
    """Arguments that fit, by name."""
    if name in ("wq_gemm", "wq_gemm_many", "wq_gemm_dx", "wq_gemm_grouped", "wq_dequant"):
        w = draw(kind, affine, 24, 128, 32, experts=2 if name == "wq_gemm_grouped" else 0)
        given = {"qdata": w.qdata, "scale": w.scale, "shift": w.shift, **w.what, "layout": "plain"}
        if name == "wq_dequant":
            return {**given, "k": 128, "dtype": FULL, "out": torch.empty(24, 128)}
        if name == "wq_gemm_dx":
            return {"dy": torch.randn(3, 24), **given, "k": 128, "out": torch.empty(3, 128)}
        if name == "wq_gemm_many":
            return {"x": torch.randn(3, 128), **given, "bias": torch.randn(24)}
        given = {"x": torch.randn(3, 128), **given, "out": torch.empty(3, 24)}
        if name == "wq_gemm":
            return {**given, "bias": torch.randn(24)}
        return {**given, "offsets": torch.tensor([0, 1, 3]), "bias": torch.randn(2, 24)}
    x = torch.randint(-127, 128, (17, 128), dtype=torch.int8)
    if name == "quant_rows":
        return {"x": torch.randn(3, 128), "dtype": torch.int8, "column": torch.rand(128), "static_scale": torch.rand(1)}
    if name == "w4a8_gemm":
        w = draw("4", affine, 24, 128, 32)
        return {
            "x": x, "x_scale": torch.rand(17), "qdata": w.qdata, "scale": w.scale, "shift": w.shift, "bias": torch.randn(24),
            "bits": 4, "group_size": 32, "layout": "plain", "out_dtype": FULL, "out": torch.empty(17, 24),
        }  # fmt: skip
    given = {"x": x, "w": torch.randint(-127, 128, (24, 128), dtype=torch.int8), "x_scale": torch.rand(17)}
    given |= {"w_scale": torch.rand(24), "bias": torch.randn(24), "out_dtype": FULL}
    return {**given, "out": torch.empty(17, 24)} if name == "scaled_mm" else given


def call(name, given):
    if name == "wq_gemm_many":
        given = dict(given)
        fits = arguments("wq_gemm")
        weights = [tuple(one[part] for part in ("qdata", "scale", "shift")) for one in (given, fits)]
        if given["scale"] is not None and given["shift"] is None:
            weights = weights[:1] * 2
        biases = [given.pop("bias"), None]
        given = {key: value for key, value in given.items() if key not in ("qdata", "scale", "shift")}
        return kernels.wq_gemm_many(given.pop("x"), weights, biases, **given)
    return getattr(kernels, name)(**given)


def wrong_tensors(tensor):
    """(what is wrong, tensor) of a tensor argument."""
    yield "float64", tensor.double()
    yield "int64", tensor.to(torch.int64) if tensor.dtype != torch.int64 else tensor.to(torch.int16)
    yield "bool", tensor.bool()
    yield "complex", torch.zeros(tensor.shape, dtype=torch.complex64)
    yield "float8", tensor.to(FP8[0]) if tensor.dtype not in FP8 else tensor.to(FULL)
    yield "uint16", tensor.to(torch.uint16)
    yield "sparse", tensor.float().to_sparse()
    yield "device", tensor.to("meta")
    yield "more dimensions", tensor[None]
    yield "fewer dimensions", tensor.flatten()[0]
    for axis in range(tensor.dim()):
        yield f"longer in {axis}", torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)
        yield f"shorter in {axis}", tensor.narrow(axis, 0, tensor.shape[axis] // 2)
        yield f"nothing in {axis}", tensor.narrow(axis, 0, 0)


#: What fits all the same: another number of rows of x, one scale for all rows, codes of another type of 8 bits.
ROWS = {"longer in 0", "shorter in 0", "more dimensions"}
SCALAR = {"more dimensions", "fewer dimensions"}
FINE = {
    "x": ROWS, "dy": ROWS, "x_scale": SCALAR, "w_scale": SCALAR, "static_scale": SCALAR, "qdata": {"float8"}
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_fits_is_launched(name):
    with pytest.raises(Launched):
        call(name, arguments(name))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_tensor(name):
    passed = []
    for kind, affine in (
        (("4", True), ("8", False), ("3", False), ("table4", False)) if name.startswith("wq") else (("4", True),)
    ):
        for argument, tensor in arguments(name, kind, affine).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            for what, wrong in wrong_tensors(tensor):
                given = {**arguments(name, kind, affine), argument: wrong}
                if argument not in ("out", "bias") and "out" in given:
                    given["out"] = None  # so that its shape is not what is found to be wrong
                happened = outcome(name, given)
                if happened and not (happened.startswith("Launched") and what in FINE.get(argument, ())):
                    passed.append((kind, argument, what, happened))
    assert not passed


def outcome(name, given):
    """What happened instead of a ValueError that says what was found and what is expected; empty if nothing did."""
    try:
        call(name, given)
    except Exception as error:
        text = str(error)
        right = type(error) is ValueError and ": found " in text and ", expected " in text
        return "" if right else f"{type(error).__name__}: {text}"
    return "it returned"


WRONG = {
    "bits": (0, 9, -1, "4", 4.5, None), "group_size": (0, -32, 48, 256, "32", 1.5), "layout": ("exec2", "", None, 1),
    "k": (0, -1, 127 // 2, 1.5, "128"), "dtype": (torch.int16, torch.float64, None, "float16"),
    "out_dtype": (torch.int8, torch.float64, None, "float16"), "codebook": (), "small_float": ("e2m2", "e9m1", "f2", 3),
}  # fmt: skip


@pytest.mark.parametrize("name", LAUNCHERS)
def test_each_other_argument(name):
    passed = []
    for kind in ("4", "e2m1") if name.startswith("wq") else ("4",):
        given = arguments(name, kind, affine=kind == "4")
        for argument, values in WRONG.items():
            for value in values if argument in given else ():
                if happened := outcome(name, {**given, argument: value}):
                    passed.append((kind, argument, value, happened))
    assert not passed


@pytest.mark.parametrize("name", [name for name in LAUNCHERS if "out" in arguments(name)])
def test_results_that_kernels_cannot_write(name):
    given = arguments(name)
    rows, columns = given["out"].shape
    for out in (
        torch.empty(columns, rows).T, torch.empty(1, columns).expand(rows, -1), torch.empty(rows, 2 * columns)[:, ::2],
        torch.empty(rows, columns + 1)[:, 1:],
    ):  # fmt: skip
        assert outcome(name, {**given, "out": out}) == ""


def test_weights_and_activations_of_types_that_do_not_go_together():
    given = arguments("scaled_mm")
    for x, w in ((torch.int8, FP8[0]), (FP8[0], torch.int8), (torch.uint8, torch.int8), (FULL, FULL)):
        assert outcome("scaled_mm", {**given, "x": given["x"].to(x), "w": given["w"].to(w)}) == ""
    given, table = arguments("wq_gemm"), torch.rand(16)
    for more in (
        {"codebook": table}, {"small_float": "e2m1"}, {"shift": None, "codebook": table, "small_float": "e2m1"},
        {"shift": None, "codebook": torch.rand(8)}, {"shift": None, "codebook": torch.ones(16, dtype=torch.int32)},
    ):  # fmt: skip
        assert outcome("wq_gemm", {**given, **more}) == ""
    assert outcome("wq_gemm", {**arguments("wq_gemm", "u8"), "shift": None}) == ""
