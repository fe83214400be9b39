"""How contestants in processes of their own take turns: a line for each call, a line in return.

A contestant is a module that is run with its job, JSON, as its argument. When it is ready it says
in a line what it is, and after each call that it is asked for it answers with another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Contestant", "serve"]

_ROOT = Path(__file__).resolve().parents[2]


class Contestant:
    """A process that makes calls on demand.

    Args:
        module: that `serve`s.
        job: its argument, what JSON can say.
        python: the interpreter that runs it, whose environment has what it needs.
        environment: variables to add to this process's own.

    Attributes:
        version: what it said that it is.

    Raises:
        RuntimeError: it ended before it was ready, or in a call; what it wrote stands above.
    """

    def __init__(
        self,
        module: str,
        job: Mapping[str, Any],
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = f"{module} {json.dumps(dict(job))}"
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(dict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env={**os.environ, **(environment or {})},
        )
        self.version = self._line()

    def call(self) -> None:
        """One more call, to its end."""
        self._process.stdin.write("call\n")
        self._process.stdin.flush()
        self._line()

    @property
    def peak(self) -> int:
        """Bytes of memory that the process had at most."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        (line,) = (x for x in status.splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def close(self) -> int:
        """Let the process end; its code."""
        for pipe in (self._process.stdin, self._process.stdout):
            pipe.close()
        return self._process.wait()

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with code {self.close()}.")
        return line.strip()


def serve(version: str, ready: Callable[[dict[str, Any]], Callable[[], Any]]) -> None:
    """Get ready for the job in the command line, and make calls until no more is asked for.

    Args:
        version: what the contestant is, in a line.
        ready: job -> what to call; it returns when all is computed.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print
    call = ready(json.loads(sys.argv[1]))
    print(version, file=answers, flush=True)
    for _ in sys.stdin:
        call()
        print("done", file=answers, flush=True)
