"""Runs llama.cpp for benchmarks/cpu_models.py, in an interpreter that has llama-cpp-python.

Reads lines of JSON, ``{"tokens": [...], "fresh": true}``: evaluates the tokens, after emptying the cache if ``fresh``, and
prints ``{"seconds": ...}``. The first line that it prints contains the version.
"""

import json
import sys
import time

import llama_cpp


def main() -> None:
    path, threads = sys.argv[1], int(sys.argv[2])
    model = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["fresh"]:
            model.reset()
        start = time.perf_counter()
        model.eval(request["tokens"])
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main()
