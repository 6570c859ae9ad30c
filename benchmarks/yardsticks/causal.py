"""Trains the small causal language model: 11 M parameters, from scratch, on Debian's documentation (`debian.training_text`).

    PYTHONPATH=benchmarks python -m yardsticks.causal              # 45 minutes on one core; continues after a stop

The architecture is Llama's (grouped queries, tied embeddings), the tokenizer a byte-level BPE of 4096 tokens trained on the
same text. Nothing is chosen by it: it is a model that no file format and no quantizer has ever touched. The checkpoint is in
bfloat16 beside the other cached models, with `train.log`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from yardsticks import example
from yardsticks.debian import training_text

real_models = example("real_models.py")

NAME = "debian-causal-11m"
VOCABULARY, WINDOW, BATCH, STEPS = 4096, 256, 8, 2400
RATES, WARM_UP = (0.02, 3e-3), 20  # of Muon and of AdamW


def new_model() -> LlamaForCausalLM:
    """The untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def tokens(folder: Path) -> torch.Tensor:
    """The ids of the training text ``[n]``; tokenizer and ids are made once and kept in `folder`."""
    path = folder / "ids.pt"
    if not path.exists():
        text = training_text()
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(text.split("\n\n"), VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer._tokenizer, bos_token="<|end|>", eos_token="<|end|>", model_max_length=WINDOW
        ).save_pretrained(folder)
        pieces = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
        ids = [i for piece in pieces for i in tokenizer.encode(piece).ids]
        torch.save(torch.tensor(ids, dtype=torch.int16), path)
    return torch.load(path, weights_only=True)


def train(minutes: float) -> Path:
    """Trains for `STEPS` steps or the given minutes, whichever ends first; returns the directory of the model."""
    target = real_models.cache_dir() / NAME
    if target.is_dir():
        return target
    work = real_models.cache_dir() / f".{NAME}-training"
    work.mkdir(parents=True, exist_ok=True)
    ids = tokens(work)
    ids, kept_back = ids[:-20_480], ids[-20_480:].long().view(-1, WINDOW)
    torch.manual_seed(0)
    model = new_model().train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    # Few steps are affordable, and Muon needs the fewest.
    optimizers = [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=RATES[1], weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    step, spent = 0, 0.0
    state = work / "state.pt"
    if state.exists():
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        for optimizer, own in zip(optimizers, kept["optimizers"]):
            optimizer.load_state_dict(own)
        step, spent = kept["step"], kept["spent"]
    log = (work / "train.log").open("a", encoding="utf-8")
    start, running = time.time() - spent, []

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    say(f"{sum(p.numel() for p in model.parameters())} parameters, {len(ids)} tokens, from step {step}")
    while step < STEPS and time.time() - start < 60 * minutes:
        progress = max(step / STEPS, (time.time() - start) / (60 * minutes))
        for optimizer, rate in zip(optimizers, RATES):
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / WARM_UP, 1.5 * (1 - progress))
        random = torch.Generator().manual_seed(step)
        begins = torch.randint(len(ids) - WINDOW, (BATCH,), generator=random)
        batch = torch.stack([ids[b : b + WINDOW] for b in begins]).long()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        running.append(loss.item())
        if step % 25 == 0:
            say(f"step {step:5d}  loss {sum(running) / len(running):.4f}  {time.time() - start:6.0f} s")
            running = []
            kept = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
            torch.save(kept | {"step": step, "spent": time.time() - start}, state)
    model = model.to(torch.bfloat16).eval()
    with torch.no_grad():
        losses = [model(input_ids=piece, labels=piece).loss.item() for piece in kept_back.split(8)]
    say(f"{step} steps, {time.time() - start:.0f} s, loss {sum(losses) / len(losses):.4f} on the last 20,480 tokens")
    new = work / "new"
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(work).save_pretrained(new)
    shutil.copy(work / "train.log", new / "train.log")
    new.replace(target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(train(options.minutes))
