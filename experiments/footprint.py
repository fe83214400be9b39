"""Memory and cores: what compiled programs need, whole processes took, and this one may use.

A process that is measured is a child of its own (`child`), so that it holds nothing else.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

__all__ = [
    "available",
    "child",
    "cores",
    "forget_traces",
    "give_back",
    "job",
    "of_program",
    "peak",
    "programs_in",
    "resident",
    "restart_peak",
]

_JOB = "ZOQO_JOB"
_ROOT = Path(__file__).resolve().parents[1]


def of_program(compiled: Any) -> dict[str, int] | None:
    """Bytes that a compiled program says it needs; None where the backend does not say.

    Args:
      compiled: what `jax.jit(...).lower(...).compile()` returned.

    Returns:
      Bytes of "temp", "argument" and "output", and of "alias", what is both of the last two.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> compiled = jax.jit(lambda x: x + 1, donate_argnums=0).lower(jnp.zeros(8)).compile()
      >>> bytes_of = of_program(compiled)
      >>> bytes_of["argument"], bytes_of["output"], bytes_of["alias"]
      (32, 32, 32)
    """
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    names = ("temp", "argument", "output", "alias")
    return {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}


def resident() -> dict[str, int | None]:
    """Bytes of memory of this process, now and at most, and of the accelerator at most."""
    device = jax.local_devices()[0].memory_stats() or {}
    now = peak = None
    status = _lines("/proc/self/status")
    if status:
        now, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"now": now, "peak": peak, "device_peak": device.get("peak_bytes_in_use")}


def peak() -> float:
    """MiB of memory that this process had at most."""
    return (resident()["peak"] or 0) / 2**20


def restart_peak() -> None:
    """Let `resident` and `peak` tell of what is taken from now on, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def available() -> int:
    """Bytes of the machine's memory that programs may still take."""
    memory = _lines("/proc/meminfo")
    if "MemAvailable" in memory:
        return int(memory["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def cores() -> int:
    """How many this process may use, of those that the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forget_traces() -> None:
    """Drop what JAX keeps of all functions that it compiled, and give that memory back."""
    jax.clear_caches()
    give_back()


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc)."""
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


def child(
    module: str, asked: dict[str, Any], environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run `python -m MODULE` and return what it printed last, as JSON.

    XLA's compiler takes more memory than a small model does, and its memory stays with the process.
    So a program should be compiled before, by another process.

    Args:
      module: it asks `job()` what to do.
      asked: what JSON can say.
      environment: variables to add to this process's own.

    Raises:
      RuntimeError: it did not end well.
    """
    variables = {
        **os.environ,
        _JOB: json.dumps(asked),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # or an accelerator's memory is all taken at once
        **(environment or {}),
    }
    command = [sys.executable, "-m", module]
    out = subprocess.run(command, env=variables, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    if out.returncode:
        raise RuntimeError(f"python -m {module} ended with code {out.returncode} at {asked}.")
    return json.loads(out.stdout.splitlines()[-1])


def programs_in(folder: str | Path) -> dict[str, str]:
    """Variables by which a process keeps all programs that it compiles in a folder, and finds them.

    Example:
      >>> programs_in("compiled")["JAX_COMPILATION_CACHE_DIR"]
      'compiled'
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def job() -> dict[str, Any] | None:
    """What this process was started for by `child`, or None."""
    return json.loads(os.environ[_JOB]) if _JOB in os.environ else None


def _lines(path: str) -> dict[str, str]:
    """The "name: value" lines of a file of the system's, if there is one."""
    if not Path(path).exists():
        return {}
    return dict(line.split(":", 1) for line in Path(path).read_text().splitlines())
