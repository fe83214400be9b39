"""Check the types of a function inside another one without making its check at each call.

The import hook of jaxtyping decorates every function of the package, and one that is defined inside
another is defined anew each time the outer one runs: 1,089 times in 62 tests of
test_optax_contract.py, where beartype wrote 151 checks of 1 to 2 ms again and again.
"""

import functools
import threading
import types

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
_checks = {}


class _Running(threading.local):
    """What is called at present, innermost last, in each thread."""

    def __init__(self):
        self.fns = []


_running = _Running()


def install():
    """Before the package is imported: `jaxtyping.jaxtyped` makes one check for each code."""
    jaxtyping.jaxtyped = lambda *, typechecker: functools.partial(
        _checked, _jaxtyped(typechecker=typechecker)
    )


def _checked(check, fn):
    if not isinstance(fn, types.FunctionType) or "<locals>" not in fn.__qualname__:
        return check(fn)
    if fn.__code__ not in _checks:

        @functools.wraps(fn)
        def running(*args, **kwargs):
            return _running.fns[-1](*args, **kwargs)

        _checks[fn.__code__] = check(running)

    @functools.wraps(fn)
    def wrapped(*args, **kwargs):
        _running.fns.append(fn)
        try:
            return _checks[fn.__code__](*args, **kwargs)
        finally:
            _running.fns.pop()

    return wrapped
