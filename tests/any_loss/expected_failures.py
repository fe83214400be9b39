"""Losses that fail today, by what they fail of; nothing else in the catalogue may.

A name alone means that the loss fails however it is asked, a name with a way in brackets that it
fails in that way alone.
"""

_CAUSES: dict[str, tuple[str, ...]] = {
    "JAX's vmap over the two sides asserts with explicit meshes; sides='in_turn' needs none": (
        "parallel: explicit sharding (rank_one)",
        "parallel: explicit sharding (dense)",
    ),
}
FAILURES = {case: cause for cause, cases in _CAUSES.items() for case in cases}
