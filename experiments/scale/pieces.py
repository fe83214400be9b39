"""What the pieces of a step take in one process: `python -m experiments.scale.pieces MODULE STEPS`.

Prints seconds as JSON, for `measure`.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.elastic.config import Module
from experiments.elastic.leases import Lease
from experiments.elastic.log import Record
from experiments.elastic.replica import Replica
from experiments.elastic.task import of_module


def main(module: str, steps: int) -> None:
    """Measure so many steps of a task."""
    replica = Replica(of_module(Module(module, steps=100)), 10**9)
    pieces, _ = replica.shape("losses")

    def evaluated(i: int) -> tuple[float, Any]:
        return _timed(lambda: replica.evaluate(Lease(replica.step, "losses", i, i + 1)))

    losses = np.concatenate([evaluated(i)[1][0] for i in range(pieces)])
    each, follow = [], []
    for step in range(steps):
        each += [evaluated(i)[0] for i in range(pieces)]
        record = Record(step, replica.key, (0, pieces), (0, 1), losses)
        follow.append(_timed(lambda one=record: (replica.follow([one]), replica.digest()))[0])
    digest = min(_timed(replica.digest)[0] for _ in range(5))
    found = {
        "evaluate": float(np.median(each)),
        "spread": float(np.std(np.log(each))),
        "replay": max(float(np.median(follow[1:])) - digest, 0.0),
        "pieces": pieces,
    }
    print(json.dumps(found))


def _timed(what: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = what()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
