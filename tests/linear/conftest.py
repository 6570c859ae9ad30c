import pytest
import torch

from requanto import QTensor


@pytest.fixture
def layer():
    """Makes a Linear with a quantized weight."""

    def make(kind="int8", out_features=128, in_features=192, dtype=torch.bfloat16, bias=True, **how):
        torch.manual_seed(0)
        module = torch.nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        weight = QTensor.quantize(module.weight, kind, **how)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return module

    return make
