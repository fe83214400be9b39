"""A language model of a few thousand weights in a file or folder, and examples for it."""

import json

import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments.finetune.models.families import MODULES
from zoqo_jax.interop import bitsandbytes, gguf, tokenizing

WIDTH, HIDDEN, HEADS, KV_HEADS, DEPTH = 32, 64, 4, 2, 2
WORDS = ("Ġgood", "Ġbad")


def tokenizer_metadata():
    """Byte-level tokens, and two words that are one token each."""
    tokens = [chr(i) for i in range(33, 127)] + ["Ġ"]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append(f"{word[: end - 1]} {word[end - 1]}")
            tokens.append(word[:end])
    tokens = list(dict.fromkeys(tokens))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.ones(len(tokens), np.int32),
        "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
    }


def sentence_piece_metadata(words=("great", "terrible", "It", "was")):
    """SentencePiece's tokens: bytes, letters, and words that are one token after a space."""
    letters = [*map(chr, range(33, 127)), "▁"]
    made = [f"▁{word[:end]}" for word in words for end in range(1, len(word) + 1)]
    pieces = [*letters, *dict.fromkeys(made)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    scores = -np.arange(len(tokens), dtype=np.float32)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
    }


def write_model(path, seed=0, words=None, bits_of=lambda name, layer: 4, depth=DEPTH, **changes):
    """A model of the llama architecture with Q4_0 matrices and a Q8_0 embedding.

    Other layers, and other bits of a matrix in a layer (4, 5 or 8: Q4_0, Q5_0, Q8_0) may be given.
    Metadata of another tokenizer, and of all else, may be given; of those, None takes a key away.
    """
    rng = np.random.default_rng(seed)
    words = tokenizer_metadata() if words is None else words
    vocabulary = len(words["tokenizer.ggml.tokens"])
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": depth,
        "llama.context_length": 64,
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        **words,
        **changes,
    }
    metadata = {key: value for key, value in metadata.items() if value is not None}

    def codes(bits, *shape):
        values = jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.float32)
        return zq.Quantizer(bits, block=32, scale_dtype=jnp.float16)(values)

    kv_width = WIDTH // HEADS * KV_HEADS
    shapes = {
        "attn_q": (WIDTH, WIDTH), "attn_k": (kv_width, WIDTH), "attn_v": (kv_width, WIDTH),
        "attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }  # fmt: skip
    tensors = {"token_embd.weight": codes(8, vocabulary, WIDTH)}
    for layer in range(depth):
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = np.ones(WIDTH, np.float32)
        for name, shape in shapes.items():
            tensors[f"blk.{layer}.{name}.weight"] = codes(bits_of(name, layer), *shape)
    tensors["output_norm.weight"] = np.ones(WIDTH, np.float32)
    gguf.save(path, tensors, metadata)
    return path


def write_folder(folder, seed=0):
    """A llama as Hugging Face keeps it, with NF4 matrices whose blocks have two rows or one."""
    rng = np.random.default_rng(seed)
    words = tokenizer_metadata()
    vocabulary = len(words["tokenizer.ggml.tokens"])
    settings = {
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "intermediate_size": HIDDEN, "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    kv_width = WIDTH // HEADS * KV_HEADS
    shapes = {
        "q": (WIDTH, WIDTH), "k": (kv_width, WIDTH), "v": (kv_width, WIDTH), "o": (WIDTH, WIDTH),
        "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN),
    }  # fmt: skip

    def values(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5, jnp.bfloat16)

    def codes(*shape):
        drawn = jnp.asarray(rng.integers(0, 16, shape, np.uint8))
        scale = jnp.full((1, 1), 2 / shape[-1] ** 0.5)
        grid = zq.nf4().grid
        return zq.QuantizedArray.from_codes(drawn, scale, None, grid, value_dtype=jnp.bfloat16)

    tensors = {"model.embed_tokens.weight": values(vocabulary, WIDTH)}
    tensors["model.norm.weight"] = jnp.ones(WIDTH, jnp.bfloat16)
    for layer in range(DEPTH):
        place = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{place}.{name}.weight"] = jnp.ones(WIDTH, jnp.bfloat16)
        for name, shape in shapes.items():
            tensors[f"{place}.{MODULES[name]}.weight"] = codes(*shape)
    folder.mkdir()
    bitsandbytes.save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    tokenizing.from_gguf(words).save(str(folder / "tokenizer.json"))
    return folder


def write_examples(path, count=120, seed=0):
    """JSON lines: is there a "+" in it?"""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(count):
        letters = "".join(rng.choice(list("abc+"), rng.integers(3, 9)))
        answer = " good" if "+" in letters else " bad"
        lines.append({"prompt": letters, "choices": [" bad", " good"], "answer": answer})
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path
