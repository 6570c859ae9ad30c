"""Files in the layout of Nunchaku, lane by lane as its kernels read them, and what its layers compute from them.

Nunchaku runs on GPUs only. The index arithmetic here is that of the comments in its packer (which lane loads what), not that
of the reader. The packers of deepcompressor made the same bytes of the same numbers when this was written. Results are
computed from codes and factors that were never packed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CPU = torch.device("cpu")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64, device=CPU)
SHIFT = 0.171875


def random(*shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=CPU) * spread


def half(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.bfloat16)


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """int8 [N, K / 2]: a word of lane t has codes of one row, eight columns, and there are four words for each lane."""
    rows, columns = codes.shape
    out = torch.zeros(rows // 128, columns // 64, 8, 32, 2, 2, dtype=torch.int64, device=CPU)
    for lane in range(32):
        for place in range(8):
            for low in range(2):
                for right in range(2):
                    n = 16 * torch.arange(rows // 16, device=CPU) + 8 * low + lane // 4
                    k = 64 * torch.arange(columns // 64, device=CPU) + 32 * right + 8 * (lane % 4) + place
                    found = codes[n][:, k].long().reshape(rows // 128, 8, -1).transpose(1, 2)
                    out[:, :, :, lane, low, right] |= (found & 0xF) << (4 * place)
    words = torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)
    return words.reshape(-1).view(torch.int8).reshape(rows, columns // 2)


def pack_scales(scale: torch.Tensor) -> torch.Tensor:
    """[G, N] of scales [N, G]: lane 0 loads rows 0, 1, 8, 9, lane 1 rows 2, 3, 10, 11, lane 4 rows 16, 17, 24, 25."""
    rows, groups = scale.shape
    out = torch.zeros(rows // 128, groups, 128, dtype=scale.dtype, device=CPU)
    for lane in range(32):
        for place in range(4):
            n = 16 * (lane // 4) + 2 * (lane % 4) + 8 * (place // 2) + place % 2
            out[:, :, 4 * lane + place] = scale[n::128]
    return out.reshape(groups, rows)


def pack_small_scales(scale: torch.Tensor) -> torch.Tensor:
    """[G, N] of e4m3 scales [N, G]: lane 0 loads rows 0, 32, 64, 96, lane 1 rows 8, 40 ..., lane 4 rows 1, 33 ..."""
    rows, groups = scale.shape
    bits = scale.view(torch.uint8)
    out = torch.zeros(rows // 128, groups // 4, 32, 4, 4, dtype=torch.uint8, device=CPU)
    for lane in range(32):
        for place in range(4):
            n = 8 * (lane % 4) + lane // 4 + 32 * place
            out[:, :, lane, place] = bits[n::128].reshape(rows // 128, groups // 4, 4)
    return out.reshape(groups, rows).view(torch.float8_e4m3fn)


def pack_factor(factor: torch.Tensor, down: bool) -> torch.Tensor:
    """[N, r] or [K, r]: tiles of 16 x 16, of which a lane holds two rows and four columns."""
    rank, length = factor.shape if down else factor.shape[::-1]
    out = torch.zeros(length // 16, rank // 16, 32, 2, 2, 2, dtype=factor.dtype, device=CPU)
    for lane in range(32):
        for low in range(2):
            for right in range(2):
                for place in range(2):
                    row, column = 8 * low + lane // 4, 8 * right + 2 * (lane % 4) + place
                    found = factor[row::16, column::16]
                    out[:, :, lane, low, right, place] = found.T if down else found
    return out.reshape(length, rank)


def pack_words(codes: torch.Tensor) -> torch.Tensor:
    """int32 [N / 4, K / 2]: 16 bits hold codes j, j + 8, j + 16, j + 24 of 32; four rows alternate every 64 columns."""
    rows, columns = codes.shape
    out = torch.zeros(rows // 4, columns // 64, 4, 16, dtype=torch.int64, device=CPU)
    for row in range(4):
        for run in range(2):
            for j in range(8):
                for nibble in range(4):
                    k = 64 * torch.arange(columns // 64, device=CPU) + 32 * run + 8 * nibble + j
                    out[:, :, row, 8 * run + j] |= codes[row::4][:, k].long() << (4 * nibble)
    numbers = torch.where(out >= 2**15, out - 2**16, out).to(torch.int16)
    return numbers.reshape(-1).view(torch.int32).reshape(rows // 4, columns // 2)


class File:
    """Tensors of one file, with inputs and results of its layers."""

    def __init__(self, nvfp4: bool, old: bool = True) -> None:
        self.nvfp4 = nvfp4
        self.names = ("lora_down", "lora_up", "smooth") if old else ("proj_down", "proj_up", "smooth_factor")
        self.tensors: dict[str, torch.Tensor] = {}
        self.results: dict[str, torch.Tensor] = {}

    def add(
        self,
        name: str,
        rows: int,
        columns: int,
        *,
        smooth: bool = True,
        shifted: bool = False,
        row_scales: bool = False,
    ) -> None:
        """A layer with 4-bit inputs. ``shifted``: int4 layers get inputs + SHIFT, but not their low-rank term."""
        group = 16 if self.nvfp4 else 64
        codes = torch.randint(0 if self.nvfp4 else -8, 16 if self.nvfp4 else 8, (rows, columns), device=CPU)
        parts = {"qweight": pack_codes(codes)}
        factor = torch.ones(rows, 1, dtype=torch.float64, device=CPU)
        if self.nvfp4:
            scale = random(rows, columns // group).abs().add(1).to(torch.float8_e4m3fn)
            parts["wscales"] = pack_small_scales(scale)
            if row_scales:
                row = half(random(rows).abs() + 0.5) / 64
                parts["wcscales"], factor = pack_scales(row.unsqueeze(-1)).reshape(-1), row.double().unsqueeze(-1)
            else:
                parts["wtscale"] = half(random(1).abs() + 0.5) / 64
                factor = factor * parts["wtscale"].double()
            values = E2M1[codes]
        else:
            scale = half(random(rows, columns // group).abs() / 64 + 0.01)
            parts["wscales"], values = pack_scales(scale), codes.double()
        weight = values.unflatten(-1, (-1, group)) * scale.double().unsqueeze(-1)
        weight = weight.flatten(-2) * factor
        column = half(random(columns).abs() + 0.5) if smooth else half(torch.ones(columns, device=CPU))
        up, down, bias = half(random(rows, 16) / 8), half(random(16, columns) / 8), half(random(rows))
        parts[self.names[0]], parts[self.names[1]] = pack_factor(down, True), pack_factor(up, False)
        parts[self.names[2]] = pack_scales(column.unsqueeze(-1)).reshape(-1)
        parts[f"{self.names[2]}_orig"] = parts[self.names[2]].clone()
        parts["bias"] = pack_scales(bias.unsqueeze(-1)).reshape(-1)
        self.tensors |= {f"{name}.{part}": value for part, value in parts.items()}
        x = random(4, columns)
        moved = x + SHIFT if shifted and not self.nvfp4 else x
        result = (moved / column.double()) @ weight.T + x @ down.double().T @ up.double().T + bias.double()
        self.results |= {f"{name}.x": x, f"{name}.y": result}

    def add_awq(self, name: str, rows: int, columns: int) -> None:
        """A layer with 16-bit inputs."""
        codes = torch.randint(0, 16, (rows, columns), device=CPU)
        scale, zero = (half(random(rows, columns // 64).abs() / 16 + 0.01) for _ in range(2))
        bias = half(random(rows))
        self.tensors |= {
            f"{name}.qweight": pack_words(codes),
            f"{name}.wscales": scale.T.contiguous(),
            f"{name}.wzeros": -zero.T.contiguous(),
            f"{name}.bias": bias,
        }
        weight = codes.double().unflatten(-1, (-1, 64)) * scale.double().unsqueeze(-1) - zero.double().unsqueeze(-1)
        x = random(4, columns)
        self.results |= {f"{name}.x": x, f"{name}.y": x @ weight.flatten(-2).T + bias.double()}

    def add_float(self, name: str, *shape: int) -> None:
        self.tensors[name] = half(random(*shape))

    def save(self, path: Path, metadata: dict | None = None) -> None:
        text = (
            None if metadata is None else {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
        )
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, path.with_suffix(".safetensors"), metadata=text)
        save_file(self.results, path.with_name(f"{path.name}_results.safetensors"))


D, MLP = 128, 512


def told(kind: str, model: str) -> dict:
    weight = {"dtype": "fp4_e2m1_all" if kind == "nvfp4" else "int4", "group_size": 16 if kind == "nvfp4" else 64}
    return {
        "model_class": model,
        "quantization_config": {"method": "svdquant", "weight": weight, "rank": 16},
        "config": {"_class_name": "FluxTransformer2DModel"},
    }


def flux(kind: str, v2: bool) -> File:
    file = File(kind == "nvfp4", old=not v2)
    both = "transformer_blocks.0."
    names = {
        **{"qkv_proj": "attn.to_qkv", "qkv_proj_context": "attn.add_qkv_proj", "out_proj": "attn.to_out.0"},
        **{"out_proj_context": "attn.to_add_out", "mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2"},
        **{"mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2"},
    }
    put = {old: f"{both}{new if v2 else old}" for old, new in names.items()}
    for name in ("qkv_proj", "qkv_proj_context"):
        file.add(put[name], 3 * D, D, row_scales=True)
    for name in ("out_proj", "out_proj_context"):
        file.add(put[name], D, D, smooth=False)
    for name in ("mlp_fc1", "mlp_context_fc1"):
        file.add(put[name], MLP, D)
    for name in ("mlp_fc2", "mlp_context_fc2"):
        file.add(put[name], D, MLP, shifted=True)
    for name in ("norm1.linear", "norm1_context.linear"):
        file.add_awq(both + name, 6 * D, D)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        file.add_float(f"{both}{'attn.' if v2 else ''}{name}.weight", D)
    one = "single_transformer_blocks.0."
    file.add(f"{one}{'attn.to_qkv' if v2 else 'qkv_proj'}", 3 * D, D, row_scales=True)
    file.add(f"{one}{'attn.to_out' if v2 else 'out_proj'}", D, D, smooth=False)
    file.add(f"{one}mlp_fc1", MLP, D)
    # Where both halves have a factor for each row, they are no nvfp4 weight.
    file.add(f"{one}mlp_fc2", D, MLP, shifted=True, row_scales=v2)
    file.add_awq(f"{one}norm.linear", 3 * D, D)
    for name in ("norm_q", "norm_k"):
        file.add_float(f"{one}{'attn.' if v2 else ''}{name}.weight", D)
    file.add_float("x_embedder.weight", D, 64)
    return file


def main(out: Path) -> None:
    torch.manual_seed(0)
    for kind in ("int4", "nvfp4"):
        flux(kind, v2=False).save(out / f"flux_{kind}", told(kind, "NunchakuFluxTransformer2dModel"))
        lite = File(kind == "nvfp4", old=False)
        lite.add("blocks.0.to_q", D, D, row_scales=True)
        lite.add("blocks.0.net.2", D, 256)
        lite.add_awq("blocks.0.mod", 2 * D, D)
        lite.save(out / f"lite_{kind}")
    flux("int4", v2=True).save(out / "flux2_int4", told("int4", "NunchakuFluxTransformer2DModelV2"))
    flux("nvfp4", v2=True).save(out / "flux2_nvfp4", told("nvfp4", "NunchakuFluxTransformer2DModelV2"))
    qwen = File(False, old=False)
    qwen.add("transformer_blocks.0.attn.to_qkv", 3 * D, D)
    qwen.add("transformer_blocks.0.img_mlp.net.2", D, 256, shifted=True)
    qwen.add_awq("transformer_blocks.0.img_mod.1", 6 * D, D)
    qwen.save(out / "qwen_int4", told("int4", "NunchakuQwenImageTransformer2DModel"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
