"""`make gpu-check`: every kernel checked, then timed, on a CUDA machine, one row of a file for each result.

    PYTHONPATH=src:kernels:benchmarks python -m gpu_check --out DIR              # on a GPU, under five minutes
    PYTHONPATH=src:kernels:benchmarks python -m gpu_check --dry --out DIR        # on any machine: does it run?
    PYTHONPATH=src:kernels:benchmarks python -m gpu_check --summarize DIR/gpu_check.jsonl

`cases.py` lists what is measured, `parent.py` hands the cases to child processes, `child.py` runs one, `report.py` makes the
tables and the plot.
"""
