"""What the tests of ONNX files share: a model of many layers, and an export that is compared with the model."""

import onnx
import onnxruntime
import torch

from requanto import QTensor


def parameter(weight):
    return torch.nn.Parameter(weight, requires_grad=False)


def weights_of(model):
    return [p for p in model.parameters() if isinstance(p, QTensor)]


class Layers(torch.nn.Module):
    """One Linear for each weight; forward returns all outputs. An export takes a second, so one model has many weights."""

    def __init__(self, weights):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for number, weight in enumerate(weights):
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=number % 3 != 2, dtype=weight.dtype)
            layer.weight = parameter(weight)
            self.layers.append(layer)
        self.eval()

    def forward(self, *inputs):
        by_length = {x.shape[-1]: x for x in inputs}
        return tuple(layer(by_length[layer.in_features]) for layer in self.layers)

    def inputs(self, rows=5):
        sizes = sorted({layer.in_features for layer in self.layers})
        return tuple(torch.randn(rows, size, dtype=self.layers[0].weight.dtype) for size in sizes)


def outputs(model, args):
    with torch.no_grad():
        found = model(*args)
    return found if isinstance(found, tuple) else (found,)


def error(got, want):
    """Norm of the difference, relative to that of ``want``."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def run(file, args):
    """Outputs of ONNX Runtime."""
    session = onnxruntime.InferenceSession(file)
    feed = {given.name: value.numpy() for given, value in zip(session.get_inputs(), args)}
    return [torch.from_numpy(out) for out in session.run(None, feed)]


def export(model, args, file, **options):
    """The exported program, after checking that the file is valid and computes what the model does."""
    program = torch.onnx.export(model.eval(), args, file, verbose=False, **options)
    onnx.checker.check_model(file)
    tolerance = 3e-3 if any(t.dtype == torch.float16 for t in args) else 1e-5
    for number, (got, want) in enumerate(zip(run(file, args), outputs(model, args), strict=True)):
        assert got.dtype == want.dtype
        assert error(got, want) < tolerance, number
    assert {node.domain for node in program.model.graph} <= {"", "com.microsoft"}
    return program


def operators(program):
    return {node.op_type for node in program.model.graph}


def initializers(program, end=""):
    return {name: v.const_value for name, v in program.model.graph.initializers.items() if name.endswith(end)}
