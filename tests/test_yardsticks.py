"""The yardsticks of benchmarks/: their arithmetic, on tiny material; models are not downloaded or trained here."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import yardsticks

from requanto.data import eval_text


@pytest.fixture(scope="module", autouse=True)
def _libraries() -> None:
    for library in ("transformers", "diffusers", "sklearn"):
        pytest.importorskip(library)


def test_every_model_and_text_is_in_one_half() -> None:
    from yardsticks.makers import MAKERS
    from yardsticks.texts import TEXTS

    for kind, known in (("models", MAKERS), ("texts", TEXTS)):
        chosen, reported = set(yardsticks.CHOOSE[kind]), set(yardsticks.REPORT[kind])
        assert not chosen & reported
        assert chosen | reported == set(known)


def test_noise_is_of_one_step_of_its_group() -> None:
    from yardsticks.makers import dithered

    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(3)).bfloat16()
    found = dithered(weight, torch.Generator().manual_seed(0))
    groups = weight.double().reshape(6, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    noise = ((found.double() - weight.double()).reshape(6, 3, 32) / step.unsqueeze(-1)).flatten()
    assert found.dtype == torch.float32
    assert 0.45 < noise.abs().max() <= 0.5 + 1e-4
    assert abs(noise.mean()) < 0.05
    assert noise.std().item() == pytest.approx(12**-0.5, rel=0.05)
    assert torch.equal(found, dithered(weight, torch.Generator().manual_seed(0)))


def test_dither_leaves_the_output_layer() -> None:
    from yardsticks.makers import dither

    model = torch.nn.ModuleDict({"body": torch.nn.Linear(32, 32), "lm_head": torch.nn.Linear(32, 32)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dither(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"body.weight"}


def test_paragraphs_of_a_page_leave_out_what_is_no_text() -> None:
    from yardsticks.debian import paragraphs

    page = """<html><head><title>A title that is left out</title></head><body><nav>Go to the next page now</nav>
    <h1>How packages are installed</h1><p>The first   paragraph,
    with <b>bold</b> words.</p><script>var x = "not a text at all";</script>
    <pre>apt-get install
  a-package-name</pre><p>short</p></body></html>"""
    assert paragraphs(page) == [
        "How packages are installed",
        "The first paragraph, with bold words.",
        "apt-get install\n  a-package-name",
    ]


def test_a_question_has_one_true_continuation() -> None:
    from yardsticks.choices import questions

    text = eval_text()
    made = questions(text, 12)
    assert made == questions(text, 12)
    assert {question.right for question in made} > {0, 1}
    flat = " ".join(text.split())
    for question in made:
        assert len(set(question.answers)) == 4
        assert question.context + question.answers[question.right] in flat
        wrong = [answer for i, answer in enumerate(question.answers) if i != question.right]
        assert all(question.context + answer not in flat for answer in wrong)


def test_a_text_with_too_few_paragraphs_is_refused() -> None:
    from yardsticks.choices import questions

    with pytest.raises(ValueError, match=r"30 questions need as many paragraphs of 28 words, the text has 1"):
        questions("one paragraph of several words " * 10, 30)


def test_the_likeliest_answer_a_character_is_taken() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM
    from yardsticks.choices import Question, answered

    class Letters:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 32 for letter in text]}

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).double().eval()
    asked = [Question(f"context {i}", (" aa", " bcd", " efghi", " z"), 0) for i in range(6)]
    taken = answered(model, Letters(), asked, [5])
    for question, own in zip(asked, taken, strict=True):
        totals = []
        for answer in question.answers:
            ids = torch.tensor([[5, *Letters()(question.context + answer)["input_ids"]]])
            chances = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            ends = range(ids.shape[1] - len(answer), ids.shape[1])
            totals.append(sum(chances[at - 1, ids[0, at]].item() for at in ends) / len(answer))
        assert own == max(range(4), key=totals.__getitem__)


def test_figures_beside_the_float_model() -> None:
    from yardsticks.measure import beside

    logits, reference = torch.randn(300, 50), torch.randn(300, 50)
    labels = torch.randint(50, (300,))
    nll, kl, same = beside(logits, reference, labels)
    own, true = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    assert nll == pytest.approx(-own[torch.arange(300), labels].sum().item(), rel=1e-5)
    assert kl == pytest.approx((true.exp() * (true - own)).sum().item(), rel=1e-5)
    assert same == (logits.argmax(-1) == reference.argmax(-1)).sum()
    assert beside(reference, reference, labels)[1:] == (0.0, 300)


def test_rings_of_a_branch_do_not_close_those_of_the_molecule() -> None:
    from yardsticks.reactions import bonded

    assert bonded("c1ccncc1", "-c1ccc([N+](=O)[O-])cc1") == "c1(-c5ccc([N+](=O)[O-])cc5)ccncc1"
    assert bonded("N(C)C", "CC") == "N(CC)(C)C"
    with pytest.raises(ValueError, match="does not begin with an atom"):
        bonded("=O", "C")


def test_masked_reactions_hide_a_sixth_of_the_tokens(tmp_path: Path) -> None:
    from yardsticks.reactions import _TOKEN, masked_reactions, reaction

    chance = random.Random(4)
    texts = [reaction(chance) for _ in range(200)]
    for text in texts:
        assert text.count(">>") == 1
        for molecule in text.replace(">>", ".").split("."):
            assert "".join(_TOKEN.findall(molecule)) == molecule
            assert molecule.count("(") == molecule.count(")")
    tokens = sorted({token for text in texts for token in _TOKEN.findall(text)})
    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *tokens]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    inputs, labels = masked_reactions(tmp_path, count=20)
    masked = labels >= 0
    assert inputs.shape == labels.shape == (20, 80)
    assert (inputs[masked] == vocabulary.index("[MASK]")).all()
    assert (labels[masked] >= 4).all()
    shares = masked.sum(1) / ((inputs != 0).sum(1) - 2)
    assert ((shares > 0.1) & (shares <= 1 / 6 + 1e-6)).all()
