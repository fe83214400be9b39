"""Write small folders with compressed-tensors itself, and the values that it reads from them.

    python make_compressed_tensors.py [folder]

needs torch, safetensors and compressed-tensors 0.20.1. Each folder under `compressed_tensors/` has
a config.json, a model.safetensors and an expected.npz: what the library's own decompression gives,
as float32. `act_order` has a weight_g_idx, which newer releases do not write: run the script once
more with compressed-tensors 0.9.4, and it writes that folder alone.
"""

import json
import sys
from pathlib import Path

import compressed_tensors
import numpy as np
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "compressed_tensors"
VERSION = "compressed-tensors " + compressed_tensors.__version__


def int_args(bits, **others):
    return {"num_bits": bits, "type": "int", **others}


FP4 = {"num_bits": 4, "type": "float", "symmetric": True}
NVFP4 = {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
PACK = "pack-quantized"
GROUPS = {"strategy": "group", "group_size": 32}
# By folder: by the name of a module: its format, arguments, shape and dtype.
FOLDERS = {
    "int4": {
        "model.q": (PACK, int_args(4, strategy="group", group_size=32), (6, 64), bf16),
    },
    "int4_asymmetric": {
        f"model.{name}": (PACK, int_args(4, **GROUPS, symmetric=False), *rest)
        for name, *rest in (("q", (12, 64), bf16), ("k", (16, 64), f16), ("v", (10, 64), f32))
    },
    "widths": {
        f"model.bits{bits}": (PACK, int_args(bits, **GROUPS, symmetric=symmetric), (4, 64), f16)
        for bits, symmetric in ((2, False), (3, True), (5, False), (6, True), (7, False))
    },
    "channels": {
        "model.rows": (PACK, int_args(8, strategy="channel"), (6, 50), bf16),
        "model.asymmetric": (PACK, int_args(8, strategy="channel", symmetric=False), (6, 50), bf16),
        "model.tensor": (PACK, int_args(3, strategy="tensor"), (6, 50), f32),
        "model.experts": (PACK, int_args(8, strategy="channel", symmetric=False), (3, 5, 50), bf16),
    },
    "int8": {
        "model.rows": ("int-quantized", int_args(8, strategy="channel"), (6, 50), bf16),
        "model.asymmetric": (
            "int-quantized", int_args(8, strategy="channel", symmetric=False), (6, 50), f16),
        "model.tensor": ("int-quantized", int_args(8, strategy="tensor"), (6, 50), f32),
    },
    "naive": {
        "model.few": (
            "naive-quantized", int_args(4, strategy="group", group_size=25), (6, 50), bf16),
    },
    "nvfp4": {"model.q": ("nvfp4-pack-quantized", NVFP4, (6, 64), bf16)},
    "mxfp4": {
        "model.q": (
            "mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32},
            (6, 64), bf16),
    },
}  # fmt: skip


def weight(name, shape, dtype):
    """Random numbers, not centred, with a row of small ones and a group of zeros."""
    generator = torch.Generator().manual_seed(len(name) + 31 * sum(shape))
    values = torch.randn(shape, generator=generator) + 0.3
    values[..., 1, :] *= 1e-2
    values[..., 0, : shape[-1] // 2] = 0
    return values.to(dtype)


def parameters(values, args):
    """The library's scale, zero point and global scale of a weight."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    grouped = values
    if args.strategy == "tensor":
        least, most = values.amin().reshape(1), values.amax().reshape(1)
    else:
        if args.group_size and args.group_size > 0:
            grouped = values.unflatten(-1, (-1, args.group_size))
        least, most = grouped.amin(-1), grouped.amax(-1)
        if grouped is values:
            least, most = least[..., None], most[..., None]
    overall = None
    if args.strategy == "tensor_group":
        overall = generate_gparam(values.amin().float(), values.amax().float())
    scale, zero = calculate_qparams(least, most, args, overall)
    return scale.to(values.dtype) if overall is None else scale, zero, overall


def write(folder, modules):
    from compressed_tensors.compressors.base import BaseCompressor

    tensors, expected, groups = {"model.norm.weight": torch.ones(4, dtype=bf16)}, {}, {}
    for name, (form, args, shape, dtype) in modules.items():
        args = QuantizationArgs(**args)
        values = weight(name, shape, dtype)
        scale, zero, overall = parameters(values, args)
        state = {"weight": values, "weight_scale": scale, "weight_zero_point": zero}
        if overall is not None:
            state["weight_global_scale"] = overall
        scheme = QuantizationScheme(targets=["re:.*" + name], weights=args, format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = compressor.compress(state, scheme)
        tensors.update({f"{name}.{key}": part.contiguous() for key, part in state.items()})
        expected[f"{name}.weight"] = compressor.decompress(state, scheme)["weight"]
        groups[f"group_{len(groups)}"] = scheme
    forms = {form for form, *_ in modules.values()}
    form = forms.pop() if len(forms) == 1 else "mixed-precision"
    if len(groups) == 1:
        groups["group_0"].targets = ["Linear"]
    save(folder, form, groups, tensors, expected)


def write_act_order(folder):
    from compressed_tensors.compressors import PackedQuantizationCompressor

    args = QuantizationArgs(**int_args(4, strategy="group", group_size=32, actorder="group"))
    compressor = PackedQuantizationCompressor()
    tensors, expected = {}, {}
    for name, order in (("model.mixed", torch.randperm(64)), ("model.none", None)):
        values = weight(name, (4, 64), bf16)
        g_idx = torch.full((64,), -1, dtype=torch.int32)
        if order is not None:
            g_idx = (order // 32).to(torch.int32)
        groups = [
            values[:, (torch.arange(64) // 32 if order is None else g_idx) == i] for i in (0, 1)
        ]
        scale = torch.stack([group.abs().amax(-1) for group in groups], -1) / 7.5
        scale = scale.to(bf16).clamp(min=1e-4)
        zero = torch.zeros_like(scale)
        state = compressor.compress_weight(values, scale, args, zero, g_idx)
        state |= {"weight_scale": scale, "weight_g_idx": g_idx}
        expected[f"{name}.weight"] = compressor.decompress_weight(state, args)
        tensors.update({f"{name}.{key}": part.contiguous() for key, part in state.items()})
    save(folder, PACK, {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}, tensors,
         expected)  # fmt: skip


def save(folder, form, groups, tensors, expected):
    path = HERE / folder
    path.mkdir(parents=True, exist_ok=True)
    settings = QuantizationConfig(
        config_groups=groups, format=form, quantization_status="compressed", ignore=["lm_head"]
    )
    config = {"written_by": VERSION, "quantization_config": settings.model_dump(mode="json")}
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    np.savez_compressed(
        path / "expected.npz", **{name: x.detach().float().numpy() for name, x in expected.items()}
    )
    for name, x in expected.items():
        print(folder, name, x.dtype, tuple(x.shape))


if __name__ == "__main__":
    torch.manual_seed(0)
    if tuple(map(int, compressed_tensors.__version__.split(".")[:2])) < (0, 20):
        write_act_order("act_order")
    else:
        for folder, modules in FOLDERS.items():
            write(folder, modules)
