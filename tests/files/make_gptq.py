"""Writes tests/files/gptq with GPTQModel 7.7.0 (torch 2.13, CPU): its packing, its values.

    python tests/files/make_gptq.py

A folder for each kind of file: config.json and safetensors as the library lays them out, and
expected.npz with the values that its `TorchLinear.dequantize_weight` has for each matrix,
(outputs, inputs).
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from huggingface_hub import save_torch_state_dict

HERE = Path(__file__).parent / "gptq"
INPUTS, OUTPUTS = 64, 32


def linear(bits, group, is_symmetric, has_act_order, generator, config, pack=torch.int32):
    """A `TorchLinear` of random codes, scales and zero points, and its values."""
    groups = INPUTS // group
    index = torch.arange(INPUTS, dtype=torch.int32) // group
    if has_act_order:
        index = index[torch.randperm(INPUTS, generator=generator)]
    exponents = torch.randint(-9, -5, (OUTPUTS, groups), generator=generator)
    scales = (1 + torch.rand(OUTPUTS, groups, generator=generator)) * 2.0**exponents
    scales = scales.half().float()
    zeros = torch.full((OUTPUTS, groups), 2.0 ** (bits - 1))
    if not is_symmetric:
        zeros = torch.randint(0, 2**bits, (OUTPUTS, groups), generator=generator).float()
        zeros[0, 0] = 0  # version 1 stores less one than none: the borrow goes to a neighbour
    codes = torch.randint(0, 2**bits, (OUTPUTS, INPUTS), generator=generator)
    weights = torch.nn.Linear(INPUTS, OUTPUTS, bias=True)
    weights.weight.data = scales[:, index] * (codes - zeros[:, index])
    made = TorchLinear(
        bits=bits, group_size=group, sym=is_symmetric, desc_act=has_act_order, in_features=INPUTS,
        out_features=OUTPUTS, bias=True, pack_dtype=pack, register_buffers=True,
    )  # fmt: skip
    made.pack_original(weights, scales, zeros, index)
    made.eval()
    return made


def write(name, config, modules, *, v1, dtype=torch.float16, shards=None, apart=False):
    """Save modules as the library's state dict; zero points less one in version 1."""
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    state, expected = {}, {}
    for key, module in modules.items():
        module.scales = module.scales.to(dtype)
        values = module.dequantize_weight()
        assert values.dtype == dtype
        expected[f"{key}.weight"] = (
            values.float() if dtype is torch.bfloat16 else values
        ).T.numpy()
        if v1:
            convert_gptq_v2_to_v1_format_module(module, config)
        kept = module.state_dict()
        state |= {f"{key}.{end}": kept[end].contiguous() for end in kept if "wf" not in end}
    torch.manual_seed(0)
    state["model.embed_tokens.weight"] = torch.randn(4, 8, dtype=dtype)
    save_torch_state_dict(state, folder, max_shard_size=shards or "1GB")
    said = config.to_dict()
    said.pop("meta", None)
    if apart:
        (folder / "quantize_config.json").write_text(json.dumps(said, indent=1))
        said = None
    whole = {"model_type": "llama"} | ({"quantization_config": said} if said else {})
    (folder / "config.json").write_text(json.dumps(whole, indent=1))
    np.savez_compressed(folder / "expected.npz", **expected)


def main():
    """Write all folders."""
    generator = torch.Generator().manual_seed(0)
    kinds = {"asymmetric": (False, False), "act_order": (False, True), "symmetric": (True, False)}
    for bits in (2, 3, 4, 8):
        for version in ("gptq", "gptq_v2"):
            config = QuantizeConfig(bits=bits, group_size=32, desc_act=True, format=version)
            modules = {
                f"model.layers.0.{kind}": linear(bits, 32, *how, generator, config)
                for kind, how in kinds.items()
            }
            write(f"{bits}-bits-{version}", config, modules, v1=version == "gptq")
    config = QuantizeConfig(bits=4, group_size=-1, desc_act=False, format="gptq")
    modules = {
        f"model.layers.{i}.up_proj": linear(4, 64, True, False, generator, config)
        for i in (0, 1, 2)
    }
    write("shards", config, modules, v1=True, dtype=torch.bfloat16, shards=2500, apart=True)
    config = QuantizeConfig(
        bits=4, group_size=32, desc_act=False, lm_head=True, format="gptq_v2",
        dynamic={"lm_head": {"bits": 8, "group_size": 16}, r"-:.*layers\.1\..*": {}},
    )  # fmt: skip
    modules = {
        "model.layers.0.up_proj": linear(4, 32, False, False, generator, config),
        "lm_head": linear(8, 16, False, False, generator, config),
    }
    write("dynamic", config, modules, v1=False)
    for bits, pack in ((4, torch.int16), (8, torch.int8)):
        kind = str(pack).removeprefix("torch.")
        config = QuantizeConfig(
            bits=bits, group_size=32, desc_act=False, format="gptq_v2", pack_dtype=kind
        )
        modules = {"model.up_proj": linear(bits, 32, False, False, generator, config, pack)}
        write(kind, config, modules, v1=False)


if __name__ == "__main__":
    main()
