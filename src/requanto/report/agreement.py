"""A float model's logits on a text, kept so that any number of quantized models can be compared with them.

    reference = LogitReference.of(model, tokenizer, text)
    reference.compare(quantized)["kl"]

`requanto.report.compare` runs both models each time, layer by layer; this runs the float model once and compares outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from requanto.report._inputs import Tokenizer, model_device
from requanto.report.compare_text import token_windows
from requanto.report.text_metrics import LogitMetrics, metrics_for


@dataclass(frozen=True)
class LogitReference:
    """Tokens of a text in windows, and a model's logits for them.

    Attributes:
        inputs: token ids ``[T]`` of each window, start token included.
        logits: ``[T, vocabulary]`` of each window, in the model's dtype, on the CPU.
        causal: the logits predict the next token.
    """

    inputs: Sequence[Tensor]
    logits: Sequence[Tensor] = field(repr=False)
    causal: bool

    @classmethod
    def of(
        cls, model: nn.Module, tokenizer: Tokenizer, text: str, window: int = 512, max_tokens: int | None = 4096
    ) -> LogitReference:
        """Runs a causal or masked language model on a text.

        Memory: ``max_tokens * vocabulary`` logits.

        Raises:
            ValueError: the text is too short, or the model returns no logits for each token.
        """
        inputs = [
            torch.tensor(ids, dtype=torch.int64, device="cpu")
            for ids in token_windows(model, tokenizer, text, window, max_tokens)
        ]
        logits, metrics = [], None
        for ids in inputs:
            output = _run(model, ids)
            metrics = metrics or metrics_for(model, output, ids.unsqueeze(0))
            if not isinstance(metrics, LogitMetrics):
                raise ValueError(
                    f"{type(model).__name__} returns hidden states and no logits: use requanto.report.similarity"
                )
            logits.append(output.logits[0].cpu())
        assert isinstance(metrics, LogitMetrics)
        return cls(inputs, logits, metrics.causal)

    def compare(self, model: nn.Module) -> dict[str, float | int]:
        """Runs a model of the same vocabulary; returns the results of `Comparison.summary` with the reference as ``a``."""
        metrics = LogitMetrics(self.causal)
        for ids, reference in zip(self.inputs, self.logits):
            metrics.add_logits(ids, reference, _run(model, ids).logits[0])
        return metrics.values()


@torch.inference_mode()
def _run(model: nn.Module, ids: Tensor) -> Any:
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids.unsqueeze(0).to(model_device(model)))
    finally:
        model.train(was_training)
