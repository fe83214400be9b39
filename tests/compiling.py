"""How XLA compiles in the tests: in a hurry, but for the tests of what it makes when it has time.

Nearly all that the tests do is compile, some ten thousand programs that run for a moment; so
compiled, a file of tests takes 28 s that took 46. What a program allocates is another matter: a
test that reads it has it compiled with `NORMALLY`.
"""

import functools
import os

HURRIED = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_llvm_disable_expensive_passes": True,
    # Parts of a program are compiled side by side where there are idle cores; here there are none.
    "xla_cpu_parallel_codegen_split_count": 1,
}
NORMALLY = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_use_fusion_emitters": True,
    "xla_llvm_disable_expensive_passes": False,
}


def flags(given):
    """What XLA_FLAGS is to be where it was `given`, which goes before."""
    is_hurried = os.environ["JAX_PLATFORMS"] == "cpu" and not os.environ.get("XLA_NORMALLY")
    ours = HURRIED if is_hurried else {}
    ours = {"xla_force_host_platform_device_count": 4, **ours}
    text = [f"--{name}={str(value).lower()}" for name, value in ours.items() if name not in given]
    return " ".join([given, *text]).strip()


def share_context():
    """Let all programs be lowered in one context of the compiler.

    JAX makes one for each, 8 of the 28 ms that a program of one operation takes, and they stay:
    62 tests of test_optax_contract.py took 960 MB that take 440.
    """
    from jax._src.interpreters import mlir

    mlir.make_ir_context = functools.cache(mlir.make_ir_context)
