"""Write a small folder with gpt-oss' MXFP4 blocks, and the values that transformers reads from it.

    python make_mxfp4.py [folder]

needs torch, safetensors, torchao 0.18 and transformers 5.24. No library writes this layout on a
CPU: torchao quantizes (its MX formats), this script lays codes and scales out as gpt-oss has them,
and transformers' own decoder gives expected.npz, as float32, turned back to (experts, outputs,
inputs). `down_proj` has all 256 bytes but NaN as scales.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import to_mx
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mxfp4"
LAYER = "model.layers.0.mlp.experts."


def quantized(values):
    """Blocks and scales of a stack of matrices."""
    scales, codes = to_mx(values, torch.float4_e2m1fn_x2, 32)
    scales = scales.view(torch.uint8).reshape(*values.shape[:-1], -1)
    return codes.view(torch.uint8).reshape(*scales.shape, 16), scales


def main():
    torch.manual_seed(0)
    values = torch.randn(3, 6, 64).to(torch.bfloat16)
    values[0, 1] *= 1e-3
    values[1, 2, :40] = 0
    tensors = {}
    for name, x in (("gate_up_proj", values), ("down_proj", torch.randn(1, 255, 32).bfloat16())):
        tensors[f"{LAYER}{name}_blocks"], tensors[f"{LAYER}{name}_scales"] = quantized(x)
    tensors[f"{LAYER}down_proj_scales"] = torch.arange(255, dtype=torch.uint8).reshape(1, 255, 1)
    expected = {
        LAYER + name: convert_moe_packed_tensors(
            tensors[f"{LAYER}{name}_blocks"], tensors[f"{LAYER}{name}_scales"]
        ).transpose(1, 2)
        for name in ("gate_up_proj", "down_proj")
    }
    tensors[f"{LAYER}gate_up_proj_bias"] = torch.ones(3, 6, dtype=torch.bfloat16)
    HERE.mkdir(parents=True, exist_ok=True)
    config = {
        "read_by": "transformers " + transformers.__version__,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["lm_head"],
        },
    }
    (HERE / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, HERE / "model.safetensors", {"format": "pt"})
    np.savez_compressed(
        HERE / "expected.npz", **{name: x.float().numpy() for name, x in expected.items()}
    )
    for name, x in expected.items():
        print(name, x.dtype, tuple(x.shape))


if __name__ == "__main__":
    main()
