"""Questions made from a text, and a model's answers against likelihoods computed one continuation at a time in float64."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from requanto.data import calibration_text, eval_text
from requanto.report import multiple_choice, paired_difference, questions
from requanto.report.choice import ChoiceResult, Question, _numbers

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "integration_tests"))

import transformers
from tiny_models import TINY, tiny_tokenizer

WORDS = [f"w{number}" for number in range(2000)]


@given(
    st.integers(1, 80),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(2, 5),
    st.integers(0, 2**40),
    st.integers(300, 2000),
)
def test_questions_are_what_they_promise(count, context, length, choices, seed, words):
    text = "\n".join(WORDS[:words])
    arguments = {"context_words": context, "choice_words": length, "choices": choices, "seed": seed}
    found = questions(text, count, **arguments)
    assert found == questions(text, count, **arguments)
    assert len(found) == min(count, words // (context + length))
    starts = []
    for question in found:
        passage, options = question.context.split(), [choice.split() for choice in question.choices]
        start = WORDS.index(passage[0])
        starts.append(start)
        assert passage == WORDS[start : start + context]
        assert options[question.answer] == WORDS[start + context : start + context + length]
        assert len({tuple(option) for option in options}) == choices
        for index, option in enumerate(options):
            first = WORDS.index(option[0])
            assert option == WORDS[first : first + length]
            assert index == question.answer or not set(option) & set(passage + options[question.answer])
    assert starts == sorted(set(starts))


def test_the_generator_and_a_question_are_the_same_for_ever():
    assert next(_numbers(42)) == 1562431130  # what java.util.Random(42).next(31) returns
    found = questions(" ".join(WORDS), 3, context_words=2, choice_words=1)[1]
    assert found == Question("w998 w999", ("w1515", "w1000", "w1053", "w491"), 1)  # earlier results hold for these


def test_answers_are_in_every_place_and_the_shipped_texts_have_enough_words():
    for text in (eval_text(), calibration_text()):
        found = questions(text, 400)
        assert len(found) == 400
        counts = [sum(question.answer == place for question in found) for place in range(4)]
        assert min(counts) > 70


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a b c", {}, "at least 100 words, found 3 in 5 characters"),
        ("a " * 1000, {}, "found no 4 different continuations"),
        ("a b " * 1000, {"choices": 1}, "choices at least 2"),
        ("a b " * 1000, {"count": 0}, "at least 1"),
    ],
)
def test_texts_that_give_no_questions(text, options, message):
    with pytest.raises(ValueError, match=message):
        questions(text, **options)


class WithoutCache(nn.Module):
    """A model that knows nothing of caches."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, **options):
        return SimpleNamespace(logits=self.model(input_ids=input_ids).logits)


def one_by_one(model, tokenizer, asked):
    """The choices by the definition, a sequence at a time."""
    chosen = []
    start = [] if tokenizer.bos_token_id is None or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id else [0]
    start = [tokenizer.bos_token_id for _ in start]
    for question in asked:
        context = start + tokenizer(question.context, add_special_tokens=False)["input_ids"]
        means = []
        for choice in question.choices:
            ids = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + ids])).logits[0, len(context) - 1 : -1].double()
            means.append(F.log_softmax(logits, -1)[range(len(ids)), ids].mean().item())
        chosen.append(means.index(max(means)))
    return tuple(chosen)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("cache", [True, False])
def test_answers_are_those_of_one_sequence_at_a_time(kind, cache):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    if kind == "mamba":
        config = transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=16, state_size=4, num_hidden_layers=2)
        model = transformers.MambaForCausalLM(config).double()
    else:
        model = TINY[kind].build().double()
    asked = questions(eval_text(), 20, context_words=4, choice_words=2)
    model.train()
    found = multiple_choice(model if cache else WithoutCache(model), tokenizer, asked, progress=False)
    assert model.training
    model.eval()
    assert found.chosen == one_by_one(model, tokenizer, asked)
    assert found.correct == tuple(pick == q.answer for pick, q in zip(found.chosen, asked))
    assert found.accuracy == sum(found.correct) / 20
    assert found.standard_error == pytest.approx(math.sqrt(found.accuracy * (1 - found.accuracy) / 20))


class Knowing(nn.Module):
    """Knows one text by heart: the next token of any two in a row."""

    def __init__(self, ids, size):
        super().__init__()
        self.size, self.known = size, {(a, b): c for a, b, c in zip(ids, ids[1:], ids[2:])}

    def forward(self, input_ids, **options):
        logits = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            for place, pair in enumerate(itertools.pairwise(ids), 1):
                if pair in self.known:
                    logits[row, place, self.known[pair]] = 50.0
        return SimpleNamespace(logits=logits)


def test_who_knows_the_text_answers_everything_and_who_knows_nothing_a_quarter():
    class Tokenizer:
        bos_token_id = None

        def __call__(self, text, **options):
            return {"input_ids": [int(word[1:]) for word in text.split()]}

    text, asked = " ".join(WORDS), questions(" ".join(WORDS), 90)
    assert multiple_choice(Knowing(range(2000), 2000), Tokenizer(), asked, progress=False).accuracy == 1.0
    assert multiple_choice(Knowing([], 2000), Tokenizer(), asked, progress=False).accuracy < 0.5
    assert len(questions(text, 90)) == 90


def test_difference_of_two_models_and_its_error():
    a = ChoiceResult((), (True, True, False, False, True), 0.6, 0.0, 0.0)
    b = ChoiceResult((), (True, False, True, False, False), 0.4, 0.0, 0.0)
    differences = torch.tensor([0.0, -1.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    mean, error = paired_difference(a, b)
    assert mean == pytest.approx(differences.mean().item())
    assert error == pytest.approx(differences.std(correction=0).item() / math.sqrt(5))
    assert paired_difference(a, a) == (0.0, 0.0)
    with pytest.raises(ValueError, match="answered 5 and 0 questions"):
        paired_difference(a, ChoiceResult((), (), 0.0, 0.0, 0.0))


def test_refusals():
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice(nn.Linear(1, 1), tiny_tokenizer(), [])

    class Encoder(nn.Module):
        def forward(self, input_ids, **options):
            return SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 1))

    with pytest.raises(ValueError, match="Encoder returned no logits"):
        multiple_choice(Encoder(), tiny_tokenizer(), questions(eval_text(), 2), progress=False)
