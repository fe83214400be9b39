"""GGUF files of small random decoders of each family, written with the `gguf` package."""

import gguf
import numpy as np
import tiny_model

VOCABULARY = len(tiny_model.sentence_piece_metadata()["tokenizer.ggml.tokens"])
WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_WIDTH, CONTEXT = 32, 64, 4, 2, 16, 64
SIZES = {
    "context_length": CONTEXT, "embedding_length": WIDTH, "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": HEAD_WIDTH,
    "attention.value_length": HEAD_WIDTH,
}  # fmt: skip
GEMMA3 = {"rope.freq_base": 1e6, "attention.sliding_window": 8}
GEMMA2 = {
    "attention.sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0,
}  # fmt: skip
OTHERS = {
    "attention.sliding_window_pattern": 3, "rope.freq_base_swa": 500.0,
    "final_logit_softcapping": 4.0,
}  # fmt: skip
SCALED = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
FAMILIES = {
    "llama 3.2": ("llama", 3, {"rope.freq_base": 5e5, "rope.dimension_count": HEAD_WIDTH}),
    "mistral": ("llama", 3, {}),
    "qwen3": ("qwen3", 3, {"rope.freq_base": 1e6}),
    "gemma2": ("gemma2", 4, GEMMA2),
    "gemma2 of threes": ("gemma2", 4, GEMMA2 | {"attention.sliding_window_pattern": 3}),
    "gemma3": ("gemma3", 7, GEMMA3),
    "gemma3 of threes": ("gemma3", 4, GEMMA3 | OTHERS),
    "gemma3, longer": ("gemma3", 7, GEMMA3 | SCALED),
    "gemma3 without a window": ("gemma3", 2, {"rope.freq_base": 1e6}),
}
"""general.architecture, layers, and metadata."""

MATRICES = {
    "attn_q": (HEADS * HEAD_WIDTH, WIDTH), "attn_k": (KV_HEADS * HEAD_WIDTH, WIDTH),
    "attn_v": (KV_HEADS * HEAD_WIDTH, WIDTH), "attn_output": (WIDTH, HEADS * HEAD_WIDTH),
    "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH), "ffn_down": (WIDTH, HIDDEN),
}  # fmt: skip
_NORMS = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
_MORE_NORMS = {
    "qwen3": {"attn_q_norm": HEAD_WIDTH, "attn_k_norm": HEAD_WIDTH},
    "gemma2": {"post_attention_norm": WIDTH, "post_ffw_norm": WIDTH},
    "gemma3": {
        "attn_q_norm": HEAD_WIDTH, "attn_k_norm": HEAD_WIDTH, "post_attention_norm": WIDTH,
        "post_ffw_norm": WIDTH,
    },
}  # fmt: skip


def write(path, family, type_of=lambda name, layer: "F32", seed=0, metadata=None, spread=1.0):
    """A random model.

    Args:
      path: of the file.
      family: of `FAMILIES`.
      type_of: gives the type of a layer's matrix, by its name and the layer's number.
      seed: of the weights.
      metadata: more, or others.
      spread: what matrices are multiplied by.
    """
    rng = np.random.default_rng(seed)
    kind, depth, said = FAMILIES[family]
    writer = gguf.GGUFWriter(path, kind)
    said = {f"{kind}.{key}": x for key, x in {"block_count": depth, **SIZES, **said}.items()}
    words = tiny_model.sentence_piece_metadata()
    for key, value in {**said, **words, **(metadata or {})}.items():
        _add(writer, key, value)

    def add(name, shape, kind="F32", scale=1.0):
        values = (scale * rng.normal(size=shape)).astype(np.float32)
        if len(shape) == 1 and name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        of = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}", gguf.quants.quantize(values, of), raw_dtype=of)

    add("token_embd.weight", (VOCABULARY, WIDTH), scale=0.5)
    add("output_norm.weight", (WIDTH,))
    if family == "mistral":
        add("output.weight", (VOCABULARY, WIDTH), scale=0.5)
    if family == "llama 3.2":
        factors = np.linspace(1.0, 8.0, HEAD_WIDTH // 2, dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    for layer in range(depth):
        for name, width in {**_NORMS, **_MORE_NORMS.get(kind, {})}.items():
            add(f"blk.{layer}.{name}.weight", (width,))
        for name, shape in MATRICES.items():
            add(
                f"blk.{layer}.{name}.weight", shape, type_of(name, layer), spread * shape[1] ** -0.5
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, key, value):
    if isinstance(value, list | np.ndarray):
        writer.add_array(key, value if isinstance(value, list) else value.tolist())
        return
    adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
    adders.get(type(value), writer.add_float32)(key, value)
