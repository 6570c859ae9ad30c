"""Comparisons of outputs: a kept reference, standard errors, similarities of embeddings; against their definitions."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import requanto
from requanto.cli.app import app
from requanto.data import eval_text
from requanto.report import LogitReference, compare
from requanto.report.compare_text import token_windows
from requanto.report.similarity import embeddings, passages, similarity

pytest.importorskip("transformers")
sys.path.append(str(Path(__file__).parents[2] / "integration_tests"))

import transformers
from tiny_models import TINY, tiny_tokenizer


def both(kind, weights="int4"):
    if kind == "masked":
        torch.manual_seed(0)
        a = transformers.BertForMaskedLM(TINY["bert"].config()).eval()
    else:
        a = TINY[kind].build()
    b = requanto.quantize(copy.deepcopy(a), weights=weights)
    requanto.freeze(b)
    return a, b


def by_definition(a, b, windows):
    kl, same, rise = [], [], []
    for ids in windows:
        inputs = torch.tensor([ids])
        with torch.no_grad():
            log_a, log_b = (F.log_softmax(m(input_ids=inputs).logits[0].double(), -1) for m in (a, b))
        kl.append(F.kl_div(log_b, log_a, log_target=True, reduction="none").sum(-1))
        same.append((log_a.argmax(-1) == log_b.argmax(-1)).double())
        rise.append((log_a - log_b)[range(len(ids) - 1), ids[1:]])
    return (torch.cat(x) for x in (kl, same, rise))


def error(values):
    return values.std(correction=0).item() / math.sqrt(len(values))


@pytest.mark.parametrize("kind", ["llama", "masked"])
def test_a_kept_reference_gives_what_compare_gives_and_what_the_definition_says(kind):
    a, b = both(kind)
    text, options = eval_text(), {"window": 48, "max_tokens": 300}
    reference = LogitReference.of(a, tiny_tokenizer(), text, **options)
    found = reference.compare(b)
    compared = compare(a, b, tokenizer=tiny_tokenizer(), text=text, questions=0, progress=False, **options)
    assert {name: compared.summary[name] for name in found} == pytest.approx(found, rel=1e-6)
    kl, same, rise = by_definition(a, b, token_windows(a, tiny_tokenizer(), text, 48, 300))
    assert found["tokens"] == len(kl)
    assert found["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found["kl_error"] == pytest.approx(error(kl), rel=1e-4)
    assert found["top1_agreement"] == pytest.approx(same.mean().item(), abs=2 / len(same))
    assert found["top1_error"] == pytest.approx(error(same), abs=0.01)
    assert ("perplexity_ratio" in found) == (kind == "llama")
    if kind == "llama":
        ratio = math.exp(rise.mean().item())
        assert found["perplexity_ratio"] == pytest.approx(ratio, rel=1e-5)
        assert found["perplexity_ratio"] == pytest.approx(found["perplexity_b"] / found["perplexity_a"], rel=1e-6)
        assert found["perplexity_ratio_error"] == pytest.approx(ratio * error(rise), rel=1e-4)
    alike = reference.compare(a)
    assert (alike["top1_agreement"], alike["top1_error"]) == (1.0, 0.0)
    assert alike["kl"] == pytest.approx(0, abs=1e-6)


def test_an_encoder_has_no_logits_to_keep():
    with pytest.raises(ValueError, match=r"no logits: use requanto\.report\.similarity"):
        LogitReference.of(TINY["bert"].build(), tiny_tokenizer(), "hello " * 20)


def test_similarities_by_their_definition():
    torch.manual_seed(0)
    a = torch.randn(12, 8)
    b = a + 0.3 * torch.randn(12, 8)
    found = similarity(a, b)
    cosines = [[F.cosine_similarity(x[i], x[j], 0).item() for i in range(12) for j in range(i)] for x in (a, b)]
    places = [torch.tensor(x).argsort().argsort().double() for x in cosines]
    expected = torch.corrcoef(torch.stack(places))[0, 1].item()
    assert found["pairs"] == 66
    assert found["rank_correlation"] == pytest.approx(expected, abs=1e-9)
    assert 0.5 < expected < 0.99
    own = F.cosine_similarity(a, b)
    assert found["cosine_mean"] == pytest.approx(own.mean().item(), rel=1e-5)
    assert found["cosine_min"] == pytest.approx(own.min().item(), rel=1e-5)
    assert similarity(a, 3 * a)["rank_correlation"] == pytest.approx(1)


def test_equal_similarities_share_their_rank():
    a = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])  # pairs: 1, 1, 0, 1, 0, 0
    b = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1]])  # in another order among the equal ones
    found = similarity(a, b)
    ranks_a = torch.tensor([4.0, 4, 1, 4, 1, 1])
    ranks_b = torch.tensor([5.0, 3, 0, 4, 1, 2])
    assert found["rank_correlation"] == pytest.approx(torch.corrcoef(torch.stack((ranks_a, ranks_b)))[0, 1].item())
    assert math.isnan(similarity(torch.ones(4, 2), b)["rank_correlation"])


def test_passages_and_embeddings():
    found = passages(" ".join(map(str, range(1000))), 5, words=10)
    assert [text.split()[0] for text in found] == ["0", "247", "495", "742", "990"]
    with pytest.raises(ValueError, match="at least 3 passages of 32 words, found 64 words"):
        passages("word " * 64)
    model, tokenizer = TINY["bert"].build(), tiny_tokenizer()
    rows = embeddings(model, tokenizer, ["abc def", "xyz"], progress=False)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokenizer("xyz")["input_ids"]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(rows[1], expected)
    with pytest.raises(ValueError, match="LlamaForCausalLM returns no last_hidden_state"):
        embeddings(TINY["llama"].build(), tokenizer, ["a"], progress=False)


def test_compare_reports_a_task_and_rank_correlations(caplog):
    a, b = both("llama")
    options = {"tokenizer": tiny_tokenizer(), "window": 48, "max_tokens": 100, "progress": False}
    found = compare(a, b, questions=50, **options).summary
    assert found["questions"] == 50
    assert found["choice_b"] - found["choice_a"] == pytest.approx(found["choice_difference"])
    assert 0 <= found["choice_difference_error"] < 0.1
    alike = compare(a, copy.deepcopy(a), questions=50, **options).summary
    assert (alike["choice_difference"], alike["choice_difference_error"]) == (0, 0)
    assert "choice_a" not in compare(a, b, questions=0, **options).summary
    assert "choice_a" not in compare(a, b, text="too short a text", **options).summary
    assert "no multiple choice: questions of 4 choices need a text of at least 100 words" in caplog.text
    found = compare(*both("bert"), questions=10, **options).summary
    assert found["pairs"] == 45
    assert 0.9 < found["rank_correlation"] <= 1
    assert "rank_correlation" not in compare(*both("bert"), text="too short a text", **options).summary
    assert "no rank correlation: similarities need at least 3 passages" in caplog.text


def test_classes_agree_by_the_largest_score():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    b = copy.deepcopy(a)
    with torch.no_grad():
        b[1].bias[0] += 0.5

    def run(model, seed):
        return model(torch.randn(25, 8, 8, generator=torch.Generator().manual_seed(seed)))

    found = compare(a, b, run=run, seeds=4, progress=False).summary
    with torch.no_grad():
        same = torch.cat([run(a, seed).argmax(-1) == run(b, seed).argmax(-1) for seed in range(4)]).double()
    assert 0.5 < same.mean() < 1
    assert found["top1_agreement"] == pytest.approx(same.mean().item())
    assert found["top1_error"] == pytest.approx(error(same))


def test_command_line(tmp_path):
    a, b = both("llama")
    for model, name in ((a, "float"), (b, "int4")):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    arguments = ["compare", tmp_path / "float", tmp_path / "int4", "--max-tokens", "100", "--questions", "30"]
    done = CliRunner().invoke(app, [str(x) for x in arguments])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.stdout.split())
    assert "multiple choice, 30 questions: " in shown
    assert "points" in shown
    assert "KL of the logits: " in shown
