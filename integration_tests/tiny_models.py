"""Tiny random models of the architectures that the tests cover: seeded, offline, each made in under a second.

    tiny = TINY["llama"]
    model = tiny.build()
    logits = output(model, tiny.inputs())
    save_tiny("llama", directory)                       # tiny.auto.from_pretrained(directory) loads it
    tiny_tokenizer().save_pretrained(directory)         # for pipelines

Sizes are multiples of 32, so that every weight takes groups, and weights are drawn larger than models initialize them: with
their 0.02, a tiny model's answer hardly depends on its layers, and a wrong weight would pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

VOCABULARY = 160
HIDDEN = 64
# Of every text model with special tokens below.
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# What the answer goes by in a model's output, most telling first; CLIP's is two tensors.
OUTPUT_NAMES = (("logits",), ("text_embeds", "image_embeds"), ("last_hidden_state",))


@dataclass(frozen=True)
class Tiny:
    """One architecture: its config, the class that `from_pretrained` is called on, and inputs for its forward pass."""

    config: Callable[[], Any]
    auto: Any
    inputs: Callable[[], dict[str, Tensor]]

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model with random weights, always the same ones, ready to run."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.auto.from_config(self.config())
        return model.to(dtype).eval()


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """What the model computes: logits where it has them, else its embeddings or its last hidden state."""
    with torch.no_grad():
        found = model(**inputs)
    for names in OUTPUT_NAMES:
        if all(getattr(found, name, None) is not None for name in names):
            return torch.cat([found[name] for name in names])
    raise KeyError(f"{type(model).__name__} returned {list(found)}, none of {OUTPUT_NAMES}")


def save_tiny(name: str, directory: str | Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save the model as a float checkpoint; `options` go to `save_pretrained`, e.g. `max_shard_size`."""
    TINY[name].build(dtype).save_pretrained(directory, **options)
    return Path(directory)


def tiny_tokenizer() -> tf.PreTrainedTokenizerFast:
    """ASCII characters as tokens, all within the vocabulary of the tiny text models; the rest is <unk>. No download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    # ByteLevel writes a byte as one character: printable ASCII as itself, the rest of ASCII from U+0100 on.
    letters = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet()) if ord(c) < 127 or 0x100 <= ord(c) <= 0x121]
    vocabulary = {token: index for index, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


# ---- inputs -----------------------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def token_ids(rows: int = 2, length: int = 11) -> Tensor:
    """Ordinary tokens, none of them special."""
    return torch.randint(4, VOCABULARY, (rows, length), generator=_generator())


def _text() -> dict[str, Tensor]:
    ids = token_ids()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _text_to_text() -> dict[str, Tensor]:
    return {**_text(), "decoder_input_ids": token_ids(length=5)}


def _image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=_generator())


def _clip() -> dict[str, Tensor]:
    return {**_text(), "pixel_values": _image()}


def _whisper() -> dict[str, Tensor]:
    features = torch.randn(2, 16, 60, generator=_generator())
    return {"input_features": features, "decoder_input_ids": token_ids(length=5)}


def _llava() -> dict[str, Tensor]:
    # 32 x 32 pixels in patches of 16 are 4 image tokens.
    ids = token_ids()
    ids[:, 2:6] = IMAGE_TOKEN
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _image()}


# ---- configs ----------------------------------------------------------------------------------------------------------

IMAGE_TOKEN = 3

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    **TOKENS,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
ENCODER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}
VISION = {**ENCODER, "image_size": 32, "patch_size": 16}


def _gemma3() -> Any:
    # One layer with sliding attention, one with full attention; tied embeddings, as the real ones.
    return tf.Gemma3TextConfig(
        **{**DECODER, "tie_word_embeddings": True},
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )


def _gpt_oss() -> Any:
    return tf.GptOssConfig(
        **DECODER,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=32,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def _gpt2() -> Any:
    return tf.GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=HIDDEN, n_layer=2, n_head=4, initializer_range=0.15, **TOKENS
    )


def _opt() -> Any:
    return tf.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.15,
        **TOKENS,
    )


def _t5() -> Any:
    return tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=16,
        d_ff=2 * HIDDEN,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


def _clip_config() -> Any:
    text = {**ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 32, **TOKENS}
    return tf.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=HIDDEN)


def _whisper_config() -> Any:
    return tf.WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=2 * HIDDEN,
        decoder_ffn_dim=2 * HIDDEN,
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=32,
        decoder_start_token_id=1,
        init_std=0.15,
        **TOKENS,
    )


def _llava_config() -> Any:
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION),
        text_config=tf.LlamaConfig(**DECODER),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        image_seq_length=4,
    )


CAUSAL = tf.AutoModelForCausalLM

TINY: dict[str, Tiny] = {
    "llama": Tiny(lambda: tf.LlamaConfig(**DECODER), CAUSAL, _text),
    "llama-tied": Tiny(lambda: tf.LlamaConfig(**{**DECODER, "tie_word_embeddings": True}), CAUSAL, _text),
    "qwen3": Tiny(lambda: tf.Qwen3Config(**DECODER, head_dim=32), CAUSAL, _text),
    "gemma3": Tiny(_gemma3, CAUSAL, _text),
    "mixtral": Tiny(lambda: tf.MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2), CAUSAL, _text),
    "qwen3-moe": Tiny(lambda: tf.Qwen3MoeConfig(**DECODER, **EXPERTS, head_dim=32), CAUSAL, _text),
    "gpt-oss": Tiny(_gpt_oss, CAUSAL, _text),
    "olmoe": Tiny(lambda: tf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2), CAUSAL, _text),
    "gpt2": Tiny(_gpt2, CAUSAL, _text),
    "opt": Tiny(_opt, CAUSAL, _text),
    "bert": Tiny(
        lambda: tf.BertConfig(**ENCODER, vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0),
        tf.AutoModel,
        _text,
    ),
    "t5": Tiny(_t5, tf.AutoModelForSeq2SeqLM, _text_to_text),
    "vit": Tiny(
        lambda: tf.ViTConfig(**VISION, num_labels=10),
        tf.AutoModelForImageClassification,
        lambda: {"pixel_values": _image()},
    ),
    "clip": Tiny(_clip_config, tf.AutoModel, _clip),
    "whisper": Tiny(_whisper_config, tf.AutoModelForSpeechSeq2Seq, _whisper),
    "llava": Tiny(_llava_config, tf.AutoModelForImageTextToText, _llava),
}

MIXTURES = ("mixtral", "qwen3-moe", "gpt-oss", "olmoe")
"""Models whose experts are fused into 3D parameters."""
