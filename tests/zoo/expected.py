"""What is known to fail, so that the tests say when it no longer does: by model, the message.

"run NAME" is a model that is traced and does not pass when it runs. One that passes fails its test
until it is taken out of here.
"""

__all__ = ["FAILS"]

# Leaves that are no arrays: `explain` traces them, `tx.update` makes zeros of them.
_FUNCTION = "TypeError: zeros_like requires ndarray or scalar arguments, got a function"
_NUMBER = "TracerBoolConversionError in explain; a number among the leaves became an array"
_TEXT = "TypeError: data type 'batch' not understood"
# nnx checks that what it changes was made where it is changed.
_CHANGED = "TraceContextError: Cannot mutate Param (or RngCount) from a different trace level"
_EXTRACTED = "ValueError: Cannot extract graph node from different trace level"
_CUSTOM_VJP = "NotImplementedError: _QuaxTrace must override process_custom_vjp_call"
_REMAT = "remat2 gets arrays of floats"

FAILS: dict[str, str] = {
    "equimo.convnext": _NUMBER,
    "equimo.mlla": _FUNCTION,
    "equimo.vit": _NUMBER,
    "equinox.batch_norm": _TEXT,
    "equinox.cnn": _FUNCTION,
    "equinox.dropout": _NUMBER,
    "equinox.mlp": _FUNCTION,
    "equinox.spectral_norm": _NUMBER,
    "equinox.stacked": _FUNCTION,
    "equinox.transformer": _FUNCTION,
    "haiku.layer_stack": _REMAT,
    "keras.cnn": "reshape (of a depthwise kernel) gets an array of floats",
    "language.bert_checkpointed": _REMAT,
    "language.llama3_remat": _CHANGED,
    "language.penzai": "gather (of a table with its axes in another order) gets an array of floats",
    "language.penzai_stack": "gather gets an array of floats",
    "language.qwen3_remat": _CHANGED,
    "linen.lstm": "concatenate gets arrays of floats",
    "linen.spectral_norm": "dot_general of two weights makes the smaller an array of floats",
    "linen.transformer_remat": _REMAT,
    "linen.transformer_scan_remat": _REMAT,
    "nnx.custom_vjp": _EXTRACTED,
    "nnx.dropout": _CHANGED,
    "nnx.gru": _CHANGED,
    "nnx.lstm": _CHANGED,
    "nnx.transformer_jit": _CHANGED,
    "nnx.transformer_remat": _CHANGED,
    "nnx.transformer_scan": _EXTRACTED,
    "science.coupling_flow": _FUNCTION,
    "solvers.neural_ode": _CUSTOM_VJP,
    "solvers.neural_ode_adaptive": _CUSTOM_VJP,
    "solvers.ridge": _FUNCTION,
}
