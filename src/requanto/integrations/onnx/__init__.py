"""`torch.onnx.export` of quantized models.

The function is wrapped, so nothing but ``import requanto`` is needed. With ``dynamo=True`` the file holds the codes and
scales (docs/onnx.md): operators on quantized weights are traced as nodes of their own (`requanto.runtime.onnx_nodes`), and
`requanto.integrations.onnx.lower` replaces them by operators of ONNX and ONNX Runtime. The tracer of ``dynamo=False`` sees
float weights, which a warning says.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from requanto.nn.mixin import QModuleMixin
from requanto.runtime import onnx_nodes
from requanto.tensor.qtensor import QTensor

logger = logging.getLogger(__name__)


def register() -> None:
    """Wraps `torch.onnx.export`; a second call does nothing."""
    if not hasattr(torch.onnx.export, "_requanto"):
        torch.onnx.export = _wrapped(torch.onnx.export)


def _wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def export(model: Any, args: Any = (), f: Any = None, **options: Any) -> Any:
        if not _is_quantized(model):
            return original(model, args, f, **options)
        if options.get("dynamo", True) or isinstance(model, torch.export.ExportedProgram):
            return _export(original, model, args, f, **options)
        logger.warning(
            "torch.onnx.export(dynamo=False) writes the dequantized weights, so the file is as large as that of the float "
            "model. With dynamo=True it holds the codes (this needs the packages onnx and onnxscript)."
        )
        return original(model, args, f, **options)

    export._requanto = True  # type: ignore[attr-defined]
    return export


def _is_quantized(model: Any) -> bool:
    if isinstance(model, torch.export.ExportedProgram):
        stored = (*model.state_dict.values(), *model.constants.values())
        return any(isinstance(tensor, QTensor) for tensor in stored) or _reads_parts(model)
    if not isinstance(model, nn.Module):
        return False
    if any(isinstance(t, QTensor) for tensors in (model.parameters(), model.buffers()) for t in tensors):
        return True
    return any(isinstance(module, QModuleMixin) and module.weight_qtype is not None for module in model.modules())


def _export(
    original: Callable[..., Any],
    model: Any,
    args: Any,
    f: Any,
    *,
    export_params: bool = True,
    keep_initializers_as_inputs: bool = False,
    external_data: bool = True,
    verify: bool = False,
    **options: Any,
) -> Any:
    if isinstance(model, torch.export.ExportedProgram):
        if _reads_parts(model):
            raise ValueError(
                "torch.onnx.export: this exported program reads the parts of quantized weights itself, as it does for "
                "embeddings and convolutions and after run_decompositions(). Call torch.onnx.export with the module instead."
            )
    else:
        _check_frozen(model)
    with onnx_nodes.exports():
        program = original(model, args, None, **options)
    from requanto.integrations.onnx.lower import lower

    lower(program.model)
    # Its nodes for quantized weights compute nothing.
    program.exported_program = None
    if verify:
        _verify(program, model, args, options.get("kwargs"))
    if f is not None:
        if hasattr(f, "write"):
            f.write(program.model_proto.SerializeToString())
        else:
            program.save(
                f,
                include_initializers=export_params,
                keep_initializers_as_inputs=keep_initializers_as_inputs,
                external_data=external_data,
            )
    return program


def _check_frozen(model: nn.Module) -> None:
    modules = ((name, m) for name, m in model.named_modules() if isinstance(m, QModuleMixin))
    training = [name for name, module in modules if module.weight_qtype is not None and not module.frozen]
    if training:
        raise ValueError(
            f"torch.onnx.export: the weights of {', '.join(training[:3])}{' ...' if training[3:] else ''} are rounded in "
            f"each forward, for training. Call requanto.freeze(model) first."
        )


def _reads_parts(program: torch.export.ExportedProgram) -> bool:
    """True if operators of the program, other than Requanto's GEMM of a whole weight, read codes or scales."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    return any(
        "access_subclass_inner_tensor" in target
        or (target.startswith("requanto.") and not target.startswith("requanto.linear_weight"))
        for target in targets
    )


def _verify(program: Any, model: Any, args: Any, kwargs: dict[str, Any] | None) -> None:
    """For ``verify=True``: compares ONNX Runtime's outputs with the model's for the example arguments; logs the result."""
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    module = model.module() if isinstance(model, torch.export.ExportedProgram) else model
    with torch.no_grad():
        wanted = module(*args, **(kwargs or {}))
    tensors = [t for t in torch.utils._pytree.tree_leaves(wanted) if isinstance(t, torch.Tensor)]
    for number, (got, want) in enumerate(zip(program(*args, **(kwargs or {})), tensors)):
        error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)
        level = logging.INFO if error < 1e-3 else logging.WARNING
        logger.log(level, "torch.onnx.export: output %d differs from the model's by %.1e of its norm", number, error)
