"""Writes tests/files/awq with AutoAWQ 0.2.9 (torch 2.13, CPU): its packing, its values.

    python tests/files/make_awq.py

A folder for each kind of file: config.json and safetensors as the library lays them out, and
expected.npz with the values that its `dequantize_gemm` has for each matrix, (outputs, inputs).
AutoAWQ itself needs older versions of other packages; the two modules that are needed here do not.
"""

import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict

HERE = Path(__file__).parent / "awq"
INPUTS, OUTPUTS = 64, 32


def import_parts():
    """AutoAWQ's packing and unpacking, without what else its package imports."""
    root = Path(importlib.util.find_spec("awq").submodule_search_locations[0])
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    return WQLinear_GEMM, dequantize_gemm


def linear(layer, group, has_zero_points, generator):
    """A layer of random codes, scales and zero points (8 where there are none)."""
    groups = INPUTS // group
    index = torch.arange(INPUTS) // group
    scales = (1 + torch.rand(groups, OUTPUTS, generator=generator)) * 2.0**-7
    scales = scales.half().float()
    zeros = torch.randint(0, 16, (groups, OUTPUTS), generator=generator)
    if not has_zero_points:
        zeros[:] = 8
    codes = torch.randint(0, 16, (INPUTS, OUTPUTS), generator=generator)
    weights = torch.nn.Linear(INPUTS, OUTPUTS, bias=True)
    weights.weight.data = (scales[index] * (codes - zeros[index])).T.contiguous()
    return layer.from_linear(weights, 4, group, scales=scales, zeros=zeros)


def write(name, config, modules, dequantize, group, dtype=torch.float16, shards=None):
    """Save modules as the library's state dict."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state, expected = {}, {}
    for key, module in modules.items():
        module.scales = module.scales.to(dtype)
        values = dequantize(module.qweight, module.qzeros, module.scales, 4, group)
        assert values.dtype == dtype
        expected[f"{key}.weight"] = (
            values.float() if dtype is torch.bfloat16 else values
        ).T.numpy()
        state |= {f"{key}.{end}": x.contiguous() for end, x in module.state_dict().items()}
    torch.manual_seed(0)
    state["lm_head.weight"] = torch.randn(4, 8, dtype=dtype)
    save_torch_state_dict(state, folder, max_shard_size=shards or "1GB")
    whole = {"model_type": "llama", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(whole, indent=1))
    np.savez_compressed(folder / "expected.npz", **expected)


def main():
    """Write all folders."""
    layer, dequantize = import_parts()
    generator = torch.Generator().manual_seed(0)
    config = {
        "quant_method": "awq", "zero_point": True, "group_size": 32, "bits": 4, "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }  # fmt: skip
    modules = {f"model.layers.{i}.up_proj": linear(layer, 32, True, generator) for i in (0, 1)}
    write("zero-points", config, modules, dequantize, 32)
    modules = {"model.layers.0.up_proj": linear(layer, INPUTS, False, generator)}
    config |= {"zero_point": False, "group_size": -1}
    write("no-zero-points", config, modules, dequantize, INPUTS, torch.bfloat16)
    config |= {"zero_point": True, "group_size": 16}
    modules = {f"model.layers.{i}.up_proj": linear(layer, 16, True, generator) for i in (0, 1, 2)}
    write("shards", config, modules, dequantize, 16, shards=2500)


if __name__ == "__main__":
    main()
