"""A GGUF file that somebody else made: SmolLM2-135M-Instruct in Q4_1, its embedding in Q8_0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

#: loads the file, compares each weight with the float checkpoint that Transformers made of it, and measures memory
PROGRAM = """
import json, sys
import torch, requanto
from pathlib import Path
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama


def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))


file, floats = map(Path, sys.argv[1:])
before = kilobytes("VmRSS")
model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
after = kilobytes("VmHWM") - before
with safe_open(floats / "model.safetensors", framework="pt") as opened:
    different = [
        name
        for name, weight in model.named_parameters()
        if not torch.equal(weight.dequantize() if hasattr(weight, "qtype") else weight, opened.get_tensor(name))
    ]
largest = max(weight.nbytes for weight in model.parameters())
print(json.dumps({
    "different": different,
    "peak": after * 1024,
    "quantized": sum(hasattr(weight, "qtype") for weight in model.parameters()),
    "footprint": model.get_memory_footprint(),
    "largest": largest,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc, which only Linux has")
def test_equal_and_small(smollm2_gguf, smollm2_dir):
    command = [sys.executable, "-c", PROGRAM, str(smollm2_gguf), str(smollm2_dir)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    size = smollm2_gguf.stat().st_size
    assert found["different"] == []
    assert found["quantized"] == 211
    assert found["footprint"] < size
    assert found["peak"] < size + 2 * found["largest"] + 200 * 2**20
