"""Figures of a quantized model beside the float model's, for every yardstick.

    figures = measure("gemma", ours(weights="int4"))

A quantizer changes a model in place; None leaves it float. Language models (`smollm2`, `gemma`, `causal`): perplexity, KL
divergence to the float model in nats a token, how often both predict the same token, and multiple choice, on the texts of
their half. `reactions`: the same for masked tokens. `vision`, `convolutional`: KL, agreement, and digits read right.
`minilm`: 1 - cosine of embeddings. `digits`: PSNR in dB of drawn images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import requanto
from yardsticks import CHOOSE, REPORT, example, images
from yardsticks.choices import answered, questions
from yardsticks.makers import MAKERS
from yardsticks.reactions import masked_reactions
from yardsticks.texts import TEXTS

sample = example("digits_diffusion/sample.py")

Quantizer = Callable[[nn.Module], object]
TOKENS, WINDOW, QUESTIONS = 1024, 512, 100
LANGUAGE = ("smollm2", "gemma", "causal")


#: the class of Transformers that loads a model
CLASSES = {
    **dict.fromkeys(LANGUAGE, "AutoModelForCausalLM"),
    "minilm": "AutoModel",
    "reactions": "AutoModelForMaskedLM",
    **dict.fromkeys(("vision", "convolutional"), "AutoModelForImageClassification"),
}


def load(name: str) -> nn.Module:
    """The float model of a yardstick, as stored: bfloat16, float16 (`digits`) or float32."""
    folder = MAKERS[name]()
    if name == "digits":
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float16).eval()
    import transformers

    dtype = torch.bfloat16 if name in LANGUAGE else torch.float32
    return getattr(transformers, CLASSES[name]).from_pretrained(folder, dtype=dtype).eval()


def measure(name: str, quantizer: Quantizer | None = None, **sizes: int) -> dict[str, float]:
    """Quantizes the model of a yardstick and measures it.

    Args:
        name: of `makers.MAKERS`.
        quantizer: quantizes the model it is given, or puts dequantized weights into it; None: the float model itself.
        **sizes: `tokens` a text, `window` and `asked` questions of language models; fewer are faster and less certain.

    Returns:
        Figures by name.
    """
    model = load(name)
    if quantizer is not None:
        quantizer(model)
    return figures(name, model, **sizes)


def figures(name: str, model: nn.Module, **sizes: int) -> dict[str, float]:
    """The figures of a model that is quantized already; sizes are those of `measure`."""
    if name in LANGUAGE:
        return _language(name, model, **sizes)
    return {"minilm": _minilm, "digits": _digits, "reactions": _reactions}.get(name, _classifier)(name, model)


#: output layers that share their weight with an embedding, and a convolution of 512 weights
LEFT_FLOAT = ("lm_head", "cls.predictions.decoder", "pos_embed.proj")


def ours(**options: Any) -> Quantizer:
    """`requanto.quantize` with these options, for all weights of the yardsticks but those of `LEFT_FLOAT`."""

    def quantize(model: nn.Module) -> None:
        names = {name for name, _ in model.named_modules()}
        requanto.quantize(model, exclude=[name for name in LEFT_FLOAT if name in names], **options)
        requanto.freeze(model)

    return quantize


def texts_of(name: str) -> tuple[str, ...]:
    """The texts that a model is measured on: those of its half."""
    return (CHOOSE if name in CHOOSE["models"] else REPORT)["texts"]


def beside(logits: Tensor, reference: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sums over rows of negative log-likelihood, KL divergence of `logits` from `reference`, and equal predictions."""
    nll = kl = same = 0.0
    for rows, others, wanted in zip(logits.split(128), reference.split(128), labels.split(128), strict=True):
        # With the sums of exponentials apart, a vocabulary of 262,144 is read a few times less than by log_softmax.
        own, true = rows.float(), others.float()
        own_sum, true_sum = own.logsumexp(-1), true.logsumexp(-1)
        nll += (own_sum - own.gather(-1, wanted[:, None])[:, 0]).double().sum().item()
        apart = ((true - true_sum[:, None]).exp() * (true - own)).sum(-1, dtype=torch.float64)
        kl += (apart + own_sum.double() - true_sum.double()).sum().item()
        same += (rows.argmax(-1) == others.argmax(-1)).sum().item()
    return nll, kl, same


@cache
def _windows(name: str, text: str, tokens: int, window: int) -> tuple[Any, list[int], Tensor]:
    """Tokenizer, start tokens, and the ids of a text ``[windows, window]``, start tokens included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MAKERS[name]())
    prefix = tokenizer("")["input_ids"]
    ids = tokenizer(TEXTS[text](), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    size = window - len(prefix)
    rows = [prefix + ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    if not rows:
        raise ValueError(f"the text {text!r} holds {len(ids)} tokens, windows of {window} are wanted")
    return tokenizer, prefix, torch.tensor(rows)


@cache
def _reference(name: str, text: str, tokens: int, window: int) -> list[Tensor]:
    """The float model's logits of every window, ``[window - 1, vocabulary]`` in its dtype."""
    model = load(name)
    with torch.inference_mode():
        rows = _windows(name, text, tokens, window)[2]
        return [model(input_ids=row[None], use_cache=False).logits[0, :-1].clone() for row in rows]


def _language(
    name: str, model: Any, tokens: int = TOKENS, window: int = WINDOW, asked: int = QUESTIONS
) -> dict[str, float]:
    window = min(window, model.config.max_position_embeddings)
    found: dict[str, float] = {}
    total_kl = total_same = count = 0.0
    for text in texts_of(name):
        tokenizer, prefix, rows = _windows(name, text, tokens, window)
        nll = 0.0
        with torch.inference_mode():
            for ids, reference in zip(rows, _reference(name, text, tokens, window), strict=True):
                logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                own = beside(logits, reference, ids[1:])
                nll, total_kl, total_same = nll + own[0], total_kl + own[1], total_same + own[2]
        predicted = rows.shape[0] * (rows.shape[1] - 1)
        count += predicted
        found[f"perplexity_{text}"] = _exp(nll / predicted)
        if asked:
            made = questions(TEXTS[text](), asked // len(texts_of(name)))
            right = [q.right == taken for q, taken in zip(made, answered(model, tokenizer, made, prefix), strict=True)]
            found[f"choices_{text}"] = sum(right) / len(right)
    return found | {"kl": total_kl / count, "agreement": total_same / count}


def _reactions(name: str, model: Any) -> dict[str, float]:
    inputs, labels = masked_reactions(MAKERS[name]())
    masked = labels >= 0
    nll, kl, same = beside(_masked_logits(model, inputs, masked), _float_reactions(), labels[masked])
    count = int(masked.sum())
    return {"perplexity": _exp(nll / count), "kl": kl / count, "agreement": same / count}


@cache
def _float_reactions() -> Tensor:
    inputs, labels = masked_reactions(MAKERS["reactions"]())
    return _masked_logits(load("reactions"), inputs, labels >= 0)


@torch.inference_mode()
def _masked_logits(model: Any, inputs: Tensor, masked: Tensor) -> Tensor:
    """Logits ``[masked tokens, vocabulary]`` of ``[rows, tokens]``; id 0 is padding."""
    found = [
        model(input_ids=ids, attention_mask=(ids != 0).long()).logits[own]
        for ids, own in zip(inputs.split(32), masked.split(32), strict=True)
    ]
    return torch.cat(found)


def _classifier(name: str, model: Any) -> dict[str, float]:
    labels = images.digits()[3]
    logits = _class_logits(model)
    _, kl, same = beside(logits, _float_classes(name), labels)
    right = (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": right, "kl": kl / len(labels), "agreement": same / len(labels)}


@cache
def _float_classes(name: str) -> Tensor:
    return _class_logits(load(name))


@torch.inference_mode()
def _class_logits(model: Any) -> Tensor:
    """Logits ``[500, 10]`` of the test digits, with noise, so that some are hard."""
    kept = images.digits()[2]
    noise = torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
    pixels = images.pixels(kept + 0.5 * noise, images.size_of(model))
    return model(pixel_values=pixels.to(model.dtype)).logits


def _minilm(name: str, model: Any) -> dict[str, float]:
    cosine = F.cosine_similarity(_embeddings(model).double(), _float_embeddings().double())
    return {"one_minus_cosine": 1 - cosine.mean().item()}


@cache
def _float_embeddings() -> Tensor:
    return _embeddings(load("minilm"))


@torch.inference_mode()
def _embeddings(model: Any, count: int = 128) -> Tensor:
    """Mean-pooled embeddings ``[count, features]`` of lines of the shipped text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MAKERS["minilm"]())
    lines = [line for line in map(str.strip, TEXTS["eval"]().split("\n")) if 60 < len(line) < 400][:count]
    found = []
    for first in range(0, len(lines), 32):
        inputs = tokenizer(
            lines[first : first + 32], return_tensors="pt", padding=True, truncation=True, max_length=128
        )
        hidden = model(**inputs).last_hidden_state
        weights = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        found.append((hidden * weights).sum(1) / weights.sum(1))
    return torch.cat(found)


def _digits(name: str, model: nn.Module) -> dict[str, float]:
    drawn, wanted = _drawn(model), _float_drawn()
    return {"psnr_db": sample.psnr(drawn, wanted)}


@cache
def _float_drawn() -> Tensor:
    return _drawn(load("digits"))


def _drawn(model: nn.Module, count: int = 100) -> Tensor:
    """Images ``[count, 1, 8, 8]`` drawn in float32 from the same noise."""
    plain = sample.load()
    with torch.no_grad():
        weights = {name: getattr(value, "dequantize", lambda v=value: v)() for name, value in model.named_parameters()}
        for name, value in plain.named_parameters():
            value.copy_(weights[name])
    return sample.draw(plain, torch.arange(count) % 10)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
