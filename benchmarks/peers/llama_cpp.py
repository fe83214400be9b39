"""llama.cpp: the forward pass of a GGUF file, by the package llama-cpp-python."""

from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.turns import serve


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, user: object) -> None:
    """It logs thousands of lines."""


def ready(job: dict[str, Any]) -> Callable[[], Any]:
    """What is called: the logits after each sequence, all sequences in one batch.

    Args:
        job: "model", a GGUF file; "sequences" of "tokens" each; "threads".
    """
    llama_cpp.llama_log_set(_silent, None)
    llama_cpp.llama_backend_init()
    path = job["model"].encode()
    model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    sequences, tokens = job["sequences"], job["tokens"]
    count = sequences * tokens
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = count
    params.n_seq_max = sequences
    params.n_threads = params.n_threads_batch = job["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("llama.cpp made no context.")
    drawn = np.random.default_rng(0).integers(0, vocabulary, (sequences, tokens))
    batch = llama_cpp.llama_batch_init(count, 0, 1)
    batch.n_tokens = count
    for i in range(count):
        sequence, place = divmod(i, tokens)
        batch.token[i] = int(drawn[sequence, place])
        batch.pos[i] = place
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence
        batch.logits[i] = place == tokens - 1

    def forward() -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama.cpp could not decode the batch.")
        last = llama_cpp.llama_get_logits_ith(context, count - 1)
        return np.ctypeslib.as_array(last, (vocabulary,)).copy()  # it waits for what is computed

    return forward


if __name__ == "__main__":
    built = llama_cpp.llama_print_system_info().decode()
    serve(f"llama-cpp-python {llama_cpp.__version__}: {built}", ready)
