"""Small models of random weights, which the library of each format quantizes, saves and reads.

    python tests/library_folders.py write FORMAT FAMILY FOLDER
    python tests/library_folders.py read FORMAT FOLDER TOKENS.npy LOGITS.npy

A process of its own, for some of the libraries change others, and warn. All of it runs on a CPU.
"""

import os
import sys
from pathlib import Path

import numpy as np

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Qwen3": {"tie_word_embeddings": True},
    # mlx_lm reads it with whole periods of layers only. The width's root is no power of two.
    "Gemma3Text": {
        "hidden_size": 128,
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "num_hidden_layers": 6,
    },
}


def tokenizer(folder):
    """A byte-level tokenizer that `tokenizers` trained, in a folder; how many tokens it has."""
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["is it good or is it bad ? a good bad abc+ + cab"] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return -(-made.get_vocab_size() // 64) * 64


def random_model(family, folder, dtype):
    """A model of transformers, saved in a folder with its tokenizer; the folder."""
    import torch
    import transformers

    vocabulary = tokenizer(folder)
    config = getattr(transformers, f"{family}Config")(
        **SIZES | FAMILIES[family], vocab_size=vocabulary, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms begin at ones or zeros
            wide = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(wide * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def by_gptqmodel(source, folder, **settings):
    """GPTQ and AWQ."""
    import gptqmodel

    settings = gptqmodel.QuantizeConfig(bits=4, group_size=32, **settings)
    model = gptqmodel.GPTQModel.load(str(source), settings)
    model.quantize(["is it good or is it bad? abc+ cab good " * 3] * 16, batch_size=1)
    model.save(str(folder))


def read_by_gptqmodel(folder, backend):
    import gptqmodel
    import torch

    kernel = getattr(gptqmodel.BACKEND, backend)
    how = {"backend": kernel, "device": "cpu", "dtype": torch.float16}  # not bfloat16
    return gptqmodel.GPTQModel.load(str(folder), **how).model


def by_compressed_tensors(source, folder, form, **settings):
    """What its scales are of is the weights alone."""
    import transformers
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(num_bits=4, **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format=form)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    apply_quantization_config(model, config)
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        weight, overall = module.weight.data, None
        if args.strategy == "tensor_group":
            overall = generate_gparam(weight.amin().float(), weight.amax().float())
            module.weight_global_scale.data = overall
        groups = weight.unflatten(-1, (-1, args.group_size))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, overall)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tokenizer(folder)


def by_bitsandbytes(source, folder, **settings):
    import transformers

    config = transformers.BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(folder)
    tokenizer(folder)


def read_by_transformers(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


def read_by_compressed_tensors(folder):
    """Each matrix by itself: transformers 5.24 refuses the packed zero points of its own files."""
    import transformers
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = transformers.AutoConfig.from_pretrained(folder)
    said = QuantizationConfig.model_validate(dict(config.quantization_config))
    del config.quantization_config
    state = load_file(f"{folder}/model.safetensors")
    for name in [name for name in state if name.endswith(".weight_packed")]:
        base = name.removesuffix("weight_packed")
        parts = {key: state.pop(key) for key in list(state) if key.startswith(f"{base}weight_")}
        parts = {key.removeprefix(base): x for key, x in parts.items()}
        compressor = BaseCompressor.get_value_from_registry(said.format)
        found = compressor.decompress(parts, said.config_groups["group_0"])
        state[f"{base}weight"] = found["weight"]
    model = transformers.AutoModelForCausalLM.from_config(config).to(config.dtype)
    missing, others = model.load_state_dict(state, strict=False)
    assert not others and set(missing) <= {"lm_head.weight"}, (missing, others)
    return model


def by_mlx(source, folder, **settings):
    import mlx.core
    import mlx_lm

    mlx.core.set_default_device(mlx.core.cpu)
    mlx_lm.convert(str(source), str(folder), quantize=True, **settings)


def logits_of_mlx(folder, tokens):
    import mlx.core
    import mlx_lm

    mlx.core.set_default_device(mlx.core.cpu)
    model, _ = mlx_lm.load(str(folder))
    model.set_dtype(mlx.core.float32)  # its products of bfloat16 on a CPU are off by 4 %
    return np.array(model(mlx.core.array(tokens)).astype(mlx.core.float32))


NVFP4 = {"type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
GROUPS = {"type": "int", "strategy": "group", "group_size": 32}
# By name: the dtype of the weights, who writes, how, and who reads.
FORMATS = {
    "gptq": ("float16", by_gptqmodel, {"desc_act": False}, "GPTQ_TORCH"),
    "gptq act-order": (
        "float16", by_gptqmodel, {"desc_act": True, "sym": False}, "GPTQ_TORCH"),
    "awq": (
        "float16", by_gptqmodel, {"quant_method": "awq", "format": "gemm"}, "AWQ_TORCH"),
    "int4": ("float32", by_compressed_tensors, {"form": "pack-quantized", **GROUPS}, None),
    "int4 asymmetric": (
        "bfloat16", by_compressed_tensors,
        {"form": "pack-quantized", **GROUPS, "symmetric": False}, None),
    "nvfp4": ("bfloat16", by_compressed_tensors, {"form": "nvfp4-pack-quantized", **NVFP4}, None),
    "affine": ("float32", by_mlx, {"q_bits": 4, "q_group_size": 64}, None),
    "affine of 16 bits": ("bfloat16", by_mlx, {"q_bits": 4, "q_group_size": 32}, None),
    "mxfp4": ("float32", by_mlx, {"q_mode": "mxfp4"}, None),
    "nf4": (
        "float32", by_bitsandbytes,
        {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, None),
}  # fmt: skip


def write(name, family, folder):
    """A model of a family in a folder, in one of `FORMATS`."""
    dtype, by, settings, _ = FORMATS[name]
    by(random_model(family, Path(f"{folder}-floats"), dtype), Path(folder), **settings)


def read(name, folder, tokens, logits):
    """What the format's library computes, in a file."""
    _, by, _, backend = FORMATS[name]
    if by is by_mlx:
        np.save(logits, logits_of_mlx(folder, np.load(tokens)))
        return
    import torch

    if name == "int4 asymmetric":
        model = read_by_compressed_tensors(folder)
    else:
        model = read_by_gptqmodel(folder, backend) if backend else read_by_transformers(folder)
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(np.load(tokens))).logits
    np.save(logits, found.float().numpy())


if __name__ == "__main__":
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # the least that it works with
    {"write": write, "read": read}[sys.argv[1]](*sys.argv[2:])
