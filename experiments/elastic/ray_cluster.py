"""A connection to Ray: a cluster by its address, or Ray on this machine for this run alone."""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from experiments.command import say
from experiments.elastic.config import Config

__all__ = ["connected"]

_SAYS_EVERY = 10.0  # seconds between two words about a wait

_PASSED_ON = ("JAX_PLATFORMS", "XLA_FLAGS")  # of the head's environment, to workers elsewhere
# All that one process of this machine has compiled, those that come later read: a newcomer is
# there in a fraction of the time.
_COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@contextlib.contextmanager
def connected(config: Config) -> Iterator[None]:
    """Ray, as long as the `with` block lasts; workers go with it.

    Raises:
      ConnectionError: nobody answers at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray starts workers with a niceness of 15: on a machine with other work, they had 1 % of a core
    # while the head waited for them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # The head says it in a line, where Ray's takes ten and goes to standard output.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    say(f"connecting to the Ray cluster at {config.address}" if config.address else "starting Ray")
    _await(config.address, config.join_seconds)
    import ray

    given: dict[str, object] = {"address": config.address}
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if config.address:
        given["runtime_env"] = {"env_vars": passed}
    else:
        for name, value in _COMPILED.items():
            os.environ.setdefault(name, value)
        cpus = math.ceil(config.workers * config.cpus) or 1
        given = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    with _own_signals():
        try:
            ray.init(**given, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
            where = config.address or "this machine"
            words = " ".join(str(error).split())[:300]
            if "timeout" in words and "RAY_AUTH_MODE" not in os.environ:  # Ray does not say it
                words += "; a cluster that wants a token needs RAY_AUTH_MODE=token here, too"
            raise ConnectionError(f"address: there is no Ray cluster at {where}: {words}") from None
    try:
        yield
    finally:
        with _own_signals():
            ray.shutdown()


def _await(address: str, seconds: float) -> None:
    """Wait until someone answers at an address; Ray itself would not say that it waits.

    Raises:
      ConnectionError: nobody has, in time.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", and what Ray is to refuse
    began = said = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=1.0).close()
            return
        except (OSError, OverflowError) as error:
            words = getattr(error, "strerror", None) or str(error)
        now = time.monotonic()
        if now - began > seconds:
            raise ConnectionError(
                f"address: nobody answers at {address} in {seconds:.0f} seconds: {words}."
            )
        if now - said > _SAYS_EVERY:
            said = now
            say(f"address: nobody answers at {address} yet ({words}), {now - began:.0f} seconds")
        time.sleep(0.5)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, which the command has: it is given back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
