"""The frame of every command: its flags, its first line, how it is stopped, and what it refuses.

What a command compiled, the next one reads: ~/.cache/zoqo_jax, or JAX_COMPILATION_CACHE_DIR.

A command is a function of one or more dataclasses of settings. It says at once what it is doing,
and imports JAX only then. Ctrl-C, SIGTERM and a lost terminal stop it: it stores what it has, and
its last line says from where the same command goes on. What it refuses is one line, and
its exit status is not 0.
"""

import contextlib
import hashlib
import logging
import os
import platform
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import logging as absl_logging

from experiments import settings

__all__ = ["Stopped", "end_by", "run", "say", "whole"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REFUSED = (ValueError, OSError, ImportError, RuntimeError, MemoryError)


class Stopped(KeyboardInterrupt):
    """A stop whose message says what was stored."""


def say(text: str) -> None:
    """Tell whoever watches the command what it is doing, on standard error."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(text, file=sys.stderr, flush=True)


def run(
    main: Callable[..., None],
    *kinds: type,
    about: str,
    leave_out: Collection[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Run a command with the settings that its command line gives.

    Args:
      main: what to do, with one object of each kind.
      kinds: dataclasses of settings; of a name that several have, the flag is the first one's.
      about: what the command is for, which --help begins with.
      leave_out: settings that get no flag and have their defaults.
      argv: the command line without the program's name; the process's own by default.

    Raises:
      SystemExit: unless all went well. The status is 2 where the command line is wrong, 1 where
        what it asks for is refused or fails, and 128 + the signal's number after a stop.
    """
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # of nohup
            signal.signal(number, _stop)
    absl_logging.set_verbosity(absl_logging.ERROR)  # checkpoints tell much
    logging.getLogger("jax").setLevel(logging.WARNING)  # of each accelerator that it did not find
    line = settings.Line(sys.argv[1:] if argv is None else argv, kinds, leave_out)
    try:
        if line.asks_for_help:
            print(line.help(about))
            return
        try:
            given = line.settings()
        except ValueError as error:
            _end(2, f"error: {line.typed(str(error))}")
        _keep_compiled()
        main(*given)
    except KeyboardInterrupt as stop:
        number = _stops[-1] if _stops else signal.SIGINT
        stored = str(stop) or "what it had done so far is not kept, and it begins anew"
        say(f"stopped: {stored}. The same command again: {shlex.join(sys.orig_argv)}")
        _end_by[-1](128 + number)
    except _REFUSED as error:
        text = " ".join(str(error).split()) or type(error).__name__
        _end(1, f"error: {line.typed(text)}")


def _keep_compiled() -> None:
    """Have JAX keep what takes it more than a second to compile, unless the environment says where.

    Each kind of processor has a folder of its own, for programs use all instructions that it has.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    kind = platform.processor() + platform.machine()
    with contextlib.suppress(OSError):  # only Linux has this file
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "zoqo_jax" / hashlib.sha256(kind.encode()).hexdigest()[:8]
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    if "jax" in sys.modules:  # which has read its environment
        sys.modules["jax"].config.update("jax_compilation_cache_dir", str(folder))


@contextlib.contextmanager
def whole(what: str) -> Iterator[None]:
    """Finish something before a stop takes effect; a second stop takes effect at once.

    Args:
      what: a name of it, which whoever asked for the stop is told.

    Example:
      >>> done = []
      >>> try:
      ...     with whole("both halves"):
      ...         signal.raise_signal(signal.SIGINT)
      ...         done.append("the second half")
      ... except KeyboardInterrupt:
      ...     print(done)
      ['the second half']
    """
    stops: list[int] = []

    def later(number: int, frame: Any) -> None:
        if stops:
            before[number](number, frame)
        stops.append(number)
        say(f"\nstopping after {what}; a second time: at once")

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # no other may
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, later)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stops:
        signal.raise_signal(stops[0])


_stops: list[int] = []


def _stop(number: int, frame: Any) -> None:
    del frame
    _stops.append(number)
    raise KeyboardInterrupt


def _end(status: int, text: str) -> None:
    say(text)
    _end_by[-1](status)


_end_by: list[Callable[[int], Any]] = [sys.exit]


def end_by(exits: Callable[[int], Any]) -> None:
    """Have commands that are stopped, refused or fail end by something else than `sys.exit`.

    Args:
      exits: a function of the exit status that does not return.
    """
    _end_by[:] = [exits]
