"""Parts of a split sum are in memory before a program counts itself: what the compiled barrier waits for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from requanto_kernels._split import is_last, store_part


class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("hip", "gfx942", 64))


@triton.jit
def kernel(x_ptr, work_ptr, count_ptr):
    cells = tl.arange(0, 32)[:, None] * 32 + tl.arange(0, 32)[None, :]
    store_part(work_ptr, tl.program_id(0), tl.load(x_ptr + cells))
    if is_last(count_ptr, tl.program_id(0)):
        tl.store(x_ptr, 0.0)


triton.runtime.driver.set_active(Driver())
source = ASTSource(kernel, signature={"x_ptr": "*fp32", "work_ptr": "*fp32", "count_ptr": "*i64"})
print(triton.compile(source, target=Driver.get_current_target(), options={"num_warps": 4}).asm["amdgcn"])
"""


def test_each_wave_of_a_cdna_gpu_waits_for_its_stores(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    words = re.findall(r"^\s+(buffer_store|global_store|s_waitcnt vmcnt\(0\)|s_barrier)", done.stdout, re.MULTILINE)
    barrier = words.index("s_barrier")
    assert words[barrier - 1] == "s_waitcnt vmcnt(0)"
    assert words[barrier - 2].endswith("_store")
