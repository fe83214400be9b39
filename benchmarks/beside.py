"""What a user would run instead, beside this: `python -m benchmarks.beside`.

- *Forward*: of the file that `make finetune` trains, SmolLM2-135M in Q4_1, here and in llama.cpp.
- *Step*: of one query pair on the file's codes, beside MeZO and LoRA by back-propagation in
  PyTorch, in float32 and in bfloat16, on a decoder of the same shape.

Each runs in a process of its own, with as many threads, and they take turns call by call. Peaks are
of whole processes, ours with its program compiled before by another one. PyTorch and
llama-cpp-python are no part of any extra: PEERS_PYTHON names the interpreter of an environment that
has them, by default this one. llama.cpp is to be compiled for the processor at hand:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python torch

In a virtual machine that hides AMX from programs that ends at an illegal instruction: name what the
processor has instead, as in "-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON".
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from contextlib import ExitStack, closing
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark beside: loading JAX")  # which the imports below take seconds for

from benchmarks import results
from benchmarks.peers.turns import Contestant
from benchmarks.timing import Effort, interleaved
from experiments import footprint
from experiments.finetune.models import places

__all__ = ["Forward", "Step", "measure"]

_OURS, _LLAMA_CPP, _PYTORCH = (f"benchmarks.peers.{x}" for x in ("ours", "llama_cpp", "pytorch"))


@dataclasses.dataclass(frozen=True)
class Forward:
    """A forward pass, for the logits after each sequence.

    Attributes:
        sequences: that are read at once.
        tokens: of each.
    """

    sequences: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Step:
    """A step on a batch.

    Attributes:
        sequences: of the batch.
        tokens: of each.
        peer: what is beside ours: "mezo" or "lora".
        dtype: of that.
    """

    sequences: int
    tokens: int
    peer: str
    dtype: str


def cells(quick: bool) -> list[Forward | Step]:
    """Everything to measure."""
    if quick:
        return [Forward(1, 32), Step(2, 32, "mezo", "float32")]
    forwards = [Forward(1, 32), Forward(1, 512), Forward(1, 1024), Forward(16, 32)]
    types = ("float32", "bfloat16")
    return [*forwards, *(Step(16, 32, peer, x) for peer in ("mezo", "lora") for x in types)]


def measure(cell: Forward | Step, effort: Effort) -> dict[str, Any]:
    """Seconds of the calls of both, in turn, and their peaks of memory."""
    job = {
        "model": str(places.find("smollm2")),
        "sequences": cell.sequences,
        "tokens": cell.tokens,
        "threads": footprint.cores(),
    }
    is_forward = isinstance(cell, Forward)
    ours = {**job, "what": "forward" if is_forward else "step"}
    theirs = job if is_forward else {**job, "what": cell.peer, "dtype": cell.dtype}
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory() as cache, ExitStack() as exits:
        kept = footprint.programs_in(cache)
        with closing(Contestant(_OURS, ours, environment=kept)) as compiling:
            compiling.call()
        mine = exits.enter_context(closing(Contestant(_OURS, ours, environment=kept)))
        peer = Contestant(_LLAMA_CPP if is_forward else _PYTORCH, theirs, python)
        contestants = {"ours": mine, "theirs": exits.enter_context(closing(peer))}
        seconds = interleaved({name: one.call for name, one in contestants.items()}, effort)
        peaks = {name: one.peak for name, one in contestants.items()}
        versions = {name: one.version for name, one in contestants.items()}
    return {"seconds": seconds, "peak": peaks, "versions": versions}


if __name__ == "__main__":
    results.run("beside", cells, measure)
