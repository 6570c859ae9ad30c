"""Loads many damaged checkpoints and counts what comes of it.

    make fuzz COUNT=1000 SEED=0 MINUTES=10 JOBS=2
    make fuzz-loads ARGS="--only 4711"                      # one seed again, with what was changed and what came of it

Prints a JSON summary: the number of each outcome (`fuzz_child`), also by kind of mutation and by checkpoint, the places of
obscure errors, and the seeds of everything that is not as promised. The exit status is 1 if there is any.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]
sys.path[:0] = [*(str(_TESTS / name) for name in ("fuzz", "tensor")), str(_TESTS.parent / "integration_tests")]

#: Outcomes that are not faults.
ALLOWED = ("right", "clear", "float_bits", "foreign_bits", "model_config", "not_ours")


def one(base: Path, scratch: Path, seed: int, wanted: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Mutates and loads one checkpoint, all drawn from the seed."""
    import fuzz_child
    import fuzz_mutations
    from fuzz_checkpoints import CASES

    rng = random.Random(seed)
    name = rng.choice(sorted(wanted))
    place = scratch / "model"
    os.makedirs(scratch, exist_ok=True)
    shutil.rmtree(place, ignore_errors=True)
    fuzz_mutations.copy_checkpoint(base / name / "model", place)
    kind, changed = fuzz_mutations.mutate(place, rng)
    started = time.monotonic()
    outcome = fuzz_child.run(CASES[name].load, place, wanted[name])
    outcome = fuzz_child.without_digest(outcome, name, kind)
    return {
        "seed": seed, "checkpoint": name, "mutation": kind, "changed": changed, "outcome": outcome.kind,
        "place": outcome.place, "text": outcome.text, "seconds": time.monotonic() - started,
    }  # fmt: skip


def many(
    base: Path, scratch: Path, seeds: range, wanted: dict[str, dict[str, str]], jobs: int, seconds: float
) -> list[dict[str, Any]]:
    """The results of all seeds that fit in ``seconds``, in the order of the seeds, from ``jobs`` processes."""
    until, children = time.monotonic() + seconds, []
    for job in range(jobs):
        child = os.fork()
        if child:
            children.append(child)
            continue
        try:
            with open(scratch / f"results-{job}", "w") as out:
                for seed in seeds[job::jobs]:
                    if time.monotonic() > until:
                        break
                    print(json.dumps(one(base, scratch / str(job), seed, wanted)), file=out, flush=True)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    if failed:
        raise RuntimeError(f"{len(failed)} of {jobs} processes of the harness ended early; their error is above")
    lines = [line for job in range(jobs) for line in (scratch / f"results-{job}").read_text().splitlines()]
    return sorted(map(json.loads, lines), key=lambda result: result["seed"])


def summary(results: list[dict[str, Any]], first: int) -> dict[str, Any]:
    """Counts of the results, with the seeds that repeat what is not as promised."""
    by_kind: dict[str, Counter] = defaultdict(Counter)
    by_checkpoint: dict[str, Counter] = defaultdict(Counter)
    seeds: dict[str, list[int]] = defaultdict(list)
    places: Counter = Counter()
    for result in results:
        by_kind[result["mutation"]][result["outcome"]] += 1
        by_checkpoint[result["checkpoint"]][result["outcome"]] += 1
        if result["outcome"] not in ALLOWED:
            seeds[result["outcome"]].append(result["seed"])
        if result["outcome"] == "obscure":
            places[result["place"]] += 1
    return {
        "loads": len(results),
        "seed": first,
        "outcomes": dict(Counter(result["outcome"] for result in results).most_common()),
        "longest_seconds": round(max((result["seconds"] for result in results), default=0.0), 2),
        "mutations": {kind: dict(counts.most_common()) for kind, counts in sorted(by_kind.items())},
        "checkpoints": {name: dict(counts.most_common()) for name, counts in sorted(by_checkpoint.items())},
        "obscure_places": dict(places.most_common(40)),
        "seeds": {outcome: found[:50] for outcome, found in seeds.items()},
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the harness; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, help="number of loads")
    parser.add_argument("--seed", type=int, default=0, help="first seed; each load has its own, one after the other")
    parser.add_argument("--minutes", type=float, default=10, help="stop after this time")
    parser.add_argument("--jobs", type=int, default=1, help="processes that load at the same time")
    parser.add_argument("--only", type=int, help="repeat this seed and say what was changed")
    parser.add_argument("--checkpoints", nargs="*", help="only these checkpoints (the seeds then draw from them)")
    parser.add_argument("--out", type=Path, help="write the summary here as well")
    parser.add_argument("--log", type=Path, help="write every result here, one JSON object a line")
    options = parser.parse_args(argv)
    if options.count < 0 or options.minutes <= 0 or options.jobs < 1:
        parser.error("--count must be 0 or more, --minutes more than 0 and --jobs 1 or more")

    import logging

    import torch
    import transformers
    from fuzz_checkpoints import build_all

    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="requanto-fuzz-") as scratch:
        base = Path(scratch) / "base"
        wanted = build_all(base, options.checkpoints)
        if options.only is not None:
            result = one(base, Path(scratch), options.only, wanted)
            print(json.dumps(result, indent=2))
            return int(result["outcome"] not in ALLOWED)
        seeds = range(options.seed, options.seed + options.count)
        results = many(base, Path(scratch), seeds, wanted, options.jobs, 60 * options.minutes)
    if options.log is not None:
        options.log.write_text("".join(json.dumps(result) + "\n" for result in results))
    found = summary(results, options.seed)
    text = json.dumps(found, indent=2)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    bad = sum(count for outcome, count in found["outcomes"].items() if outcome not in ALLOWED)
    again = ": for each seed above, make fuzz-loads ARGS='--only SEED' says what was changed" if bad else ""
    print(f"{bad} of {found['loads']} loads are not as promised{again}", file=sys.stderr)
    return int(bad > 0)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("REQUANTO_COMPILE", "0")
    sys.exit(main())
