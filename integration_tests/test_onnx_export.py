"""`torch.onnx.export` of whole models, the ways to call it, and what it refuses."""

import io
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import requanto
from requanto import QTensor, QuantoConfig
from requanto.runtime import onnx_nodes

pytest.importorskip("onnx", reason="ONNX files need the package onnx")
pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs the package onnxscript")
pytest.importorskip("onnxruntime", reason="ONNX files are run by the package onnxruntime")
from onnx_files import Layers, error, export, initializers, operators, outputs, parameter, run

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def file(tmp_path):
    torch.manual_seed(0)
    return str(tmp_path / "model.onnx")


# ---------------------------------------------------------------------- whole models


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]


SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
TIED = {"num_key_value_heads": 2, "tie_word_embeddings": True}
MODELS = {
    "llama int4": ("LlamaForCausalLM", TIED, {"weights": "int4", "embeddings": True, "lm_head": True}),
    "llama int8 x int8": ("LlamaForCausalLM", TIED, {"weights": "int8", "activations": "int8"}),
    "gpt2 int8": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}, {"weights": "int8"}),
    "mixtral int4": ("MixtralForCausalLM", {**TIED, "num_local_experts": 4}, {"weights": "int4"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name, file, tmp_path):
    """Any number of sequences and tokens."""
    import transformers

    kind, config, how = MODELS[name]
    kind = getattr(transformers, kind)
    kind(kind.config_class(**{**SIZES, **config})).save_pretrained(tmp_path / "float")
    model = Logits(kind.from_pretrained(tmp_path / "float", quantization_config=QuantoConfig(**how)))
    axes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=64)}
    args = torch.randint(0, 160, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    program = export(model, args, file, dynamic_shapes=(axes, axes))
    other = torch.randint(0, 160, (3, 14)), torch.ones(3, 14, dtype=torch.long)
    assert error(run(file, other)[0], outputs(model, other)[0]) < 1e-5
    wanted = {"int4": "MatMulNBits", "int8": "DequantizeLinear"}[how["weights"]]
    assert ("MatMulInteger" if how.get("activations") else wanted) in operators(program)


def test_diffusers(file):
    from tiny_diffusers import TINY

    tiny = next(found for found in TINY.values() if found.class_name == "UNet2DConditionModel")
    model = tiny.make()
    requanto.quantize(model, weights="int8")
    requanto.freeze(model)
    import onnxruntime

    given = tiny.inputs(torch.float32)
    program = torch.onnx.export(model, (), file, kwargs={**given, "return_dict": False}, verbose=False)
    flat = [value for value in torch.utils._pytree.tree_leaves(given) if isinstance(value, torch.Tensor)]
    feed = {found.name: value.numpy() for found, value in zip(program.model.graph.inputs, flat)}
    session = onnxruntime.InferenceSession(file)
    got = session.run(None, {found.name: feed[found.name] for found in session.get_inputs()})[0]
    assert error(torch.from_numpy(got), tiny.run(model)) < 1e-5


# ---------------------------------------------------------------------- ways to call it

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def small(kind="int4"):
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).eval()
    requanto.quantize(model, weights=kind)
    requanto.freeze(model)
    return model


def test_names_and_the_codes_themselves(file):
    model = small("int8")
    program = export(model, (X,), file, input_names=["in"], output_names=["out"], external_data=False)
    assert [v.name for v in (*program.model.graph.inputs, *program.model.graph.outputs)] == ["in", "out"]
    found = initializers(program, "_qdata")
    assert sorted(found) == ["0.weight_qdata", "2.weight_qdata"]
    assert torch.equal(torch.from_numpy(found["0.weight_qdata"].numpy().copy()), model[0].weight.qdata)
    assert not os.path.exists(f"{file}.data")


def test_the_file_is_small(file):
    model = Layers([QTensor.quantize(torch.randn(512, 512), "int4") for _ in range(4)])
    export(model, model.inputs(), file)
    assert sum(os.path.getsize(path) for path in (file, f"{file}.data")) < 4 * 512 * 512 * 0.75


def test_into_a_buffer_without_optimization_and_verified(caplog):
    model, buffer = small(), io.BytesIO()
    with caplog.at_level(logging.INFO, logger="requanto"):
        program = torch.onnx.export(model, X, buffer, verbose=False, optimize=False, verify=True)
    assert error(run(buffer.getvalue(), (X,))[0], model(X)) < 1e-5
    assert error(program(X)[0], model(X)) < 1e-5
    assert "output 0 differs from the model's by" in caplog.text
    assert "2 MatMulNBits" in caplog.text
    assert program.exported_program is None  # its nodes for quantized weights compute nothing


def test_an_exported_program(file, tmp_path):
    model = small()
    program = torch.export.export(model, (X,))
    torch.export.save(program, tmp_path / "program.pt2")
    for found in (program, torch.export.load(tmp_path / "program.pt2")):
        torch.onnx.export(found, (), file, verbose=False)
        assert error(run(file, (X,))[0], model(X)) < 1e-5


class Looks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(24, 64)
        self.table.weight = parameter(QTensor.quantize(self.table.weight, "int4"))

    def forward(self, x):
        return self.table(x.long())


@pytest.mark.parametrize("model", [small, Looks])
def test_a_program_that_reads_the_codes_is_refused(model, file):
    program = torch.export.export(model().eval(), (X.abs(),))
    program = program.run_decompositions() if model is small else program
    with pytest.raises(ValueError, match=r"Call torch\.onnx\.export with the module instead"):
        torch.onnx.export(program, (), file, verbose=False)
    assert not os.path.exists(file)


def test_weights_in_training_are_refused(file):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32))
    requanto.quantize(model, weights="int4")
    with pytest.raises(ValueError, match=r"weights of 0 are rounded .* Call requanto.freeze\(model\) first"):
        torch.onnx.export(model, (X,), file)


class Picks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter(QTensor.quantize(torch.randn(3, 32, 64), "int4"))

    def forward(self, x, index):
        return F.linear(x, torch.index_select(self.weight, 0, index)[0])


def test_weights_that_are_not_constant_are_refused(file):
    with pytest.raises(ValueError, match=r"the result of Gather.* Dequantize this weight"):
        torch.onnx.export(Picks().eval(), (X, torch.tensor([1])), file, verbose=False)
    assert not os.path.exists(file)


def test_the_old_tracer_says_that_it_writes_floats(file, caplog):
    model = small()
    torch.onnx.export(model, (X,), file, dynamo=False)
    assert "writes the dequantized weights" in caplog.text
    assert "dynamo=True" in caplog.text
    assert error(run(file, (X,))[0], model(X)) < 1e-5


def test_bfloat16_is_written_and_said(file, caplog):
    model = Layers([QTensor.quantize(torch.randn(24, 128).bfloat16(), kind) for kind in ("int4", "int8")])
    torch.onnx.export(model, model.inputs(), file, verbose=False)
    import onnx

    onnx.checker.check_model(file, full_check=True)
    assert "no CPU kernels" in caplog.text


def test_a_float_model_is_left_to_torch(file, caplog):
    program = torch.onnx.export(torch.nn.Linear(64, 8).eval(), (X,), file, verbose=False)
    assert program.exported_program is not None
    assert not [record for record in caplog.records if record.name.startswith("requanto")]


def test_a_thread_that_compiles_meanwhile_sees_nothing_of_it():
    weight, seen = QTensor.quantize(torch.randn(32, 64), "int4"), []

    def compiles():
        torch._dynamo.reset()
        seen.append(torch.compile(lambda x: F.linear(x, weight), backend="aot_eager")(X))

    with onnx_nodes.exports():
        thread = threading.Thread(target=compiles)
        thread.start()
        thread.join()
    assert error(seen[0], F.linear(X, weight)) < 1e-6


def test_an_export_function_that_was_imported_before_requanto():
    code = (
        "import torch\nfrom torch.onnx import export\nimport requanto\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 8)).eval()\n"
        "requanto.quantize(model, weights='int4'); requanto.freeze(model)\n"
        "try: export(model, (torch.ones(2, 64),), verbose=False)\n"
        "except Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "does not know quantized weights: it was imported by name before requanto" in done.stdout
