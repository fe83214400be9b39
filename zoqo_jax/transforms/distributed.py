"""Many devices and many processes: each evaluates its share of a step, and all make the same step.

`mesh` arranges the devices of all processes, and `spread` wraps a transformation, so that its steps
are made on them; a training loop stays as it is. What devices tell each other is at most 12 bytes a
query, and 8 more for each look that a step which sizes itself takes at the loss: losses, never
weights. `jax.distributed.initialize` makes one system of several processes; under Slurm and Open
MPI it needs no arguments.

Codes are the same bit for bit on any mesh, of one device or many, as long as `parts`, the
transformation and the batches are the same, and the devices are of one kind. "Of one kind" are
processes with one jaxlib on one kind of CPU (the instructions that XLA compiles for), that see the
same number of cores: a matrix product may be summed in another order on another number of threads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from zoqo_jax.transforms.remote import Remote
from zoqo_jax.transforms.schedules import check_count
from zoqo_jax.transforms.spreading import Parts, Spread

__all__ = ["Remote", "mesh", "replicate", "spread"]

AXES = ("data", "queries")  # devices along the one have other examples, along the other queries

_PARTS = 8


def mesh(queries: int = 1, devices: Any = None) -> Mesh:
    """All devices of all processes, in rows of so many that divide the queries of a step.

    Args:
        queries: how many devices have the same examples and other queries; the number of all
            devices must be a multiple of it. More of them than a step has groups of `query_batch`
            queries are idle.
        devices: some devices instead of all.

    Returns:
        A mesh with the axes "data" and "queries".

    Raises:
        ValueError: `queries` does not divide the number of devices.

    Examples:
        >>> import zoqo_jax as zq
        >>> dict(zq.distributed.mesh(devices=jax.devices()[:1]).shape)
        {'data': 1, 'queries': 1}
    """
    check_count("queries", queries)
    devices = np.array(jax.devices() if devices is None else devices, dtype=object).reshape(-1)
    if devices.size % queries:
        raise ValueError(f"queries must divide {devices.size}, the devices, got {queries}.")
    return Mesh(devices.reshape(-1, queries), AXES)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """A tree's arrays on every device of a mesh, of which each process has to have the same ones.

    Examples:
        >>> import zoqo_jax as zq
        >>> mesh = zq.distributed.mesh(devices=jax.devices()[:1])
        >>> zq.distributed.replicate({"w": jnp.ones(2)}, mesh)["w"].sharding.is_fully_replicated
        True
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(x: Any) -> Any:
        if isinstance(x, jax.Array) and x.sharding == everywhere:
            return x
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(x))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        here = np.asarray(x)
        return jax.make_array_from_callback(here.shape, everywhere, lambda index: here[index])

    return jax.tree.map(put, tree)


def spread(
    tx: optax.GradientTransformation, mesh: Mesh, *, parts: int | None = None
) -> optax.GradientTransformationExtraArgs:
    """A transformation whose steps are spread over a mesh.

    Its `update` takes `value_fn=` and, where examples are to be divided, `batch=`: a tree of arrays
    with an axis of examples first. `value_fn(params, batch)` is then the mean loss of some of them,
    as many as a part has. A batch is divided into `parts`, which devices along the "data" axis
    evaluate, one after another where a device has several; their number, not that of devices,
    decides what is computed. Without `batch`, `value_fn(params)` is as ever, and queries are
    divided over all devices.

    Args:
        tx: one of this library, or a chain that has one, without `axis_names`.
        mesh: of the axes "data" and "queries".
        parts: of a batch; they must divide its examples. By default, the largest number up to 8
            that does.

    Returns:
        A transformation whose state is that of `tx`. Give its `update` all arrays that do not lie
        on the mesh yet inside of `jax.jit`, or by `replicate`.

    Raises:
        ValueError: `mesh` has other axes; in `update`, a batch that does not fall into parts.

    Examples:
        >>> import zoqo_jax as zq
        >>> x = jax.random.normal(jax.random.key(1), (8, 4))
        >>> loss = lambda params, batch: jnp.mean((batch @ params["w"] - 1.0) ** 2)
        >>> params = zq.quantize({"w": jnp.zeros((4, 2))}, zq.Quantizer(bits=8, range=1.0))
        >>> mesh = zq.distributed.mesh(devices=jax.devices()[:1])
        >>> tx = zq.zoqo(key=jax.random.key(0), num_queries=2)
        >>> tx = zq.distributed.spread(tx, mesh, parts=4)
        >>> @jax.jit
        ... def step(params, state, batch):
        ...     updates, state = tx.update(None, state, params, value_fn=loss, batch=batch)
        ...     return optax.apply_updates(params, updates), state
        >>> state = tx.init(params)
        >>> for _ in range(3):
        ...     params, state = step(params, state, x)
        >>> state.count.item(), state.info.evaluations.item() >= 12
        (3, True)
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"mesh must have the axes {AXES}, got {tuple(mesh.axis_names)}.")
    check_count("parts", parts, or_none=True)
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Any, state: Any, params: PyTree | None = None, *, batch: Any = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        whole, shared = PartitionSpec(), PartitionSpec("data")
        given, count = None, 0
        if batch is not None:
            *given, count = _divided(batch, parts, mesh.shape["data"])

        def run(updates: Any, state: Any, params: Any, given: Any) -> tuple[PyTree, Any]:
            own = Spread(None, AXES) if given is None else Spread(*axes, Parts(*given, count))
            return inner.update(updates, state, params, spread=own, **extra)

        axes = AXES
        if mesh.size == 1 and given is not None:
            axes = (None, None)  # the same program, and less of it
        else:
            run = jax.shard_map(
                run,
                mesh=mesh,
                in_specs=(whole, whole, whole, shared),
                out_specs=whole,
                check_vma=False,  # loops begin with what is the same on all devices
            )
        return run(updates, state, params, given)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _divided(batch: PyTree, parts: int | None, devices: int) -> tuple[PyTree, jax.Array, int]:
    """A batch in parts, as many for each device, which of them are real, and how many those are.

    Raises:
        ValueError: it has no examples, or they do not fall into so many parts of one size.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
        raise ValueError(f"batch must have arrays of as many examples each, got {shapes}.")
    ((examples,),) = sizes
    count = parts or max(n for n in range(1, _PARTS + 1) if examples % n == 0)
    if examples % count:
        raise ValueError(f"parts must divide {examples}, the examples of a batch, got {count}.")
    total = -(-count // devices) * devices
    which = np.minimum(np.arange(total), count - 1)  # the last one makes up the number

    def divide(x: Any) -> jax.Array:
        x = jnp.reshape(x, (count, examples // count, *jnp.shape(x)[1:]))
        return x if total == count else x[which]

    return jax.tree.map(divide, batch), jnp.arange(total) < count, count
