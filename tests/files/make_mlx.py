"""Write small folders with MLX on a CPU, and the values that it reads from them.

    python make_mlx.py [folder]

needs mlx 0.32 (pip install "mlx[cpu]"). Each folder under `mlx/` has a config.json as mlx_lm writes
it, a model.safetensors by `mx.save_safetensors`, and an expected.npz: what `mx.dequantize` gives on
the CPU, as float32.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

HERE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "mlx"
VERSION = "mlx " + mx.__version__
# By folder: the config's settings, and by module: its own settings, shape and dtype.
FOLDERS = {
    "affine": (
        {"group_size": 64, "bits": 4},
        {
            "model.q": (None, (4, 128), mx.bfloat16),
            "model.k": (True, (4, 64), mx.float16),
            "model.experts": ({"group_size": 32, "bits": 4}, (2, 3, 64), mx.float16),
        },
    ),
    "widths": (
        {"group_size": 32, "bits": 2, "mode": "affine"},
        {
            "model.bits2": (None, (3, 96), mx.float16),
            **{
                f"model.bits{bits}": ({"group_size": 32, "bits": bits}, (3, 96), dtype)
                for bits, dtype in ((3, mx.bfloat16), (5, mx.float32), (6, mx.bfloat16))
            },
            "model.bits8": ({"group_size": 128, "bits": 8}, (3, 128), mx.float16),
        },
    ),
    "mxfp4": (
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {
            "model.q": (None, (4, 64), mx.bfloat16),
            "model.experts": (None, (2, 3, 32), mx.bfloat16),
            "model.embed": ({"group_size": 64, "bits": 6, "mode": "affine"}, (3, 64), mx.bfloat16),
        },
    ),
    "nvfp4": ({"group_size": 16, "bits": 4, "mode": "nvfp4"},
              {"model.q": (None, (4, 64), mx.bfloat16)}),
    "mxfp8": ({"group_size": 32, "bits": 8, "mode": "mxfp8"},
              {"model.q": (None, (4, 64), mx.bfloat16)}),
}  # fmt: skip


def weight(name, shape, dtype):
    """Random numbers, not centred, with a row of small ones and a group of zeros."""
    rng = np.random.default_rng(len(name) + 31 * sum(shape))
    values = rng.normal(size=shape) - 0.3
    values[..., 1, :] *= 1e-2
    values[..., 0, : shape[-1] // 2] = 0
    return mx.array(values.astype(np.float32)).astype(dtype)


def write(folder, default, modules):
    quantization = dict(default)
    tensors, expected = {"model.norm.weight": mx.ones((4,), mx.bfloat16)}, {}
    for name, (own, shape, dtype) in modules.items():
        if own is not None:
            quantization[name] = own
        settings = own if isinstance(own, dict) else default
        packed, scales, *biases = mx.quantize(weight(name, shape, dtype), **settings)
        tensors |= {f"{name}.weight": packed, f"{name}.scales": scales}
        if biases:
            tensors[f"{name}.biases"] = biases[0]
        values = mx.dequantize(packed, scales, *biases, **settings)
        print(folder, name, values.dtype, values.shape, scales.dtype, scales.shape)
        expected[f"{name}.weight"] = np.array(values.astype(mx.float32))
    path = HERE / folder
    path.mkdir(parents=True, exist_ok=True)
    config = {"written_by": VERSION, "quantization": quantization}
    config["quantization_config"] = quantization  # mlx_lm writes both
    (path / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    mx.save_safetensors(str(path / "model.safetensors"), tensors, {"format": "mlx"})
    np.savez_compressed(path / "expected.npz", **expected)


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    for folder, (default, modules) in FOLDERS.items():
        write(folder, default, modules)
