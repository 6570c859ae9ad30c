"""Perplexity and speed on a toy language model whose answers are known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from requanto.data import calibration_text, eval_text
from requanto.report import generation_speed, perplexity

VOCABULARY = 300


class ByteTokenizer:
    """One token a byte; with `bos`, every text starts with that token unless special tokens are switched off."""

    def __init__(self, bos: int | None = None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": start + list(text.encode())}


class Toy(nn.Module):
    """Predicts the byte after the last one (b -> b + 1) with a logit of `sure`; every other logit is 0."""

    def __init__(self, sure: float = 0.0, longest: int = 1024, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=longest)
        self.sure = nn.Parameter(torch.tensor(sure, dtype=dtype))
        self.seen: list[list[int]] = []

    def forward(self, input_ids, use_cache=True):
        self.seen.append(input_ids[0].tolist())
        expected = nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY)
        return SimpleNamespace(logits=expected * self.sure)

    def generate(self, input_ids, streamer, max_new_tokens, **kwargs):
        for _ in range(max_new_tokens + 1):
            streamer.put(input_ids)
        streamer.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_model_has_the_perplexity_of_its_vocabulary(dtype):
    result = perplexity(Toy(dtype=dtype), ByteTokenizer(), "some text", progress=False)
    assert result.perplexity == pytest.approx(VOCABULARY)
    assert result.nll == pytest.approx(math.log(VOCABULARY))
    assert result.tokens == len("some text") - 1


def test_nll_is_the_mean_over_predicted_tokens():
    # Of the predicted tokens, "bcd" follow their predecessor and "x" does not.
    wrong = math.log(math.exp(2.0) + VOCABULARY - 1)
    result = perplexity(Toy(sure=2.0), ByteTokenizer(), "abcdx", progress=False)
    assert result.nll == pytest.approx((3 * (wrong - 2.0) + wrong) / 4)


def test_windows_do_not_overlap_and_a_lone_last_token_is_left_out():
    model = Toy()
    result = perplexity(model, ByteTokenizer(), "abcdefg", window=3, progress=False)
    assert model.seen == [list(b"abc"), list(b"def")]
    assert result.tokens == 4


def test_every_window_starts_with_the_start_token_where_the_tokenizer_adds_one():
    model = Toy()
    result = perplexity(model, ByteTokenizer(bos=299), "abcde", window=3, progress=False)
    assert model.seen == [[299, *b"ab"], [299, *b"cd"], [299, *b"e"]]
    assert result.tokens == 5


def test_max_tokens_and_long_windows_that_are_taken_in_chunks():
    text = "abcdefghij" * 100
    whole = perplexity(Toy(sure=1.0), ByteTokenizer(), text[:700], progress=False)
    cut = perplexity(Toy(sure=1.0), ByteTokenizer(), text, max_tokens=700, progress=False)
    assert cut.nll == pytest.approx(whole.nll, rel=1e-12)
    assert cut.tokens == 699


def test_a_senseless_model_has_infinite_perplexity():
    assert perplexity(Toy(sure=-5000.0), ByteTokenizer(), "abcdef", progress=False).perplexity == math.inf


def test_training_mode_is_restored():
    model = Toy().train()
    perplexity(model, ByteTokenizer(), "abc", progress=False)
    assert model.training


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "at least 2 tokens, found 0"),
        ("a", {}, "at least 2 tokens, found 1"),
        ("abc", {"window": 1}, "window must be at least 2"),
        ("abc", {"max_tokens": 0}, "max_tokens must be at least 2"),
        ("abc", {"window": 2000}, "takes at most 1024"),
    ],
)
def test_bad_input_is_named(text, options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Toy(), ByteTokenizer(), text, progress=False, **options)


def test_a_model_without_logits_is_named():
    model = Toy()
    model.forward = lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=input_ids)
    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        perplexity(model, ByteTokenizer(), "abc", progress=False)


def test_speed_counts_prompt_and_new_tokens():
    result = generation_speed(Toy(), ByteTokenizer(), prompt_tokens=8, new_tokens=4, repeats=1, progress=False)
    assert result.prefill_tokens_per_s > 0
    assert result.decode_tokens_per_s > 0


def test_speed_makes_one_run_however_slow_the_model():
    model = Toy()
    runs = []
    generate = model.generate
    model.generate = lambda **kwargs: (runs.append(1), generate(**kwargs))
    generation_speed(model, ByteTokenizer(), repeats=50, max_seconds=0.0, progress=False)
    assert len(runs) == 2  # the warm-up and one that counts


@pytest.mark.parametrize("bad", [{"prompt_tokens": 0}, {"new_tokens": 1}, {"repeats": 0}])
def test_speed_names_bad_sizes(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generation_speed(Toy(), ByteTokenizer(), progress=False, **bad)


def test_speed_needs_a_model_that_generates():
    with pytest.raises(ValueError, match="Linear"):
        generation_speed(nn.Linear(2, 2), ByteTokenizer(), progress=False)


def test_the_shipped_texts_are_long_and_differ():
    assert len(eval_text()) > 60_000
    assert len(calibration_text()) > 60_000
    assert not set(eval_text().split("\n\n")) & set(calibration_text().split("\n\n"))
