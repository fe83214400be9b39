"""Meshes of one device and of four (`tests/conftest.py` makes four of a CPU)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from loss_table import kind, x

loss = kind("parallel")


def mesh(count):
    return Mesh(np.array(jax.devices()[:count]), ("d",))


def sharded(fn, count, in_specs, out_specs, **more):
    return jax.shard_map(fn, mesh=mesh(count), in_specs=in_specs, out_specs=out_specs, **more)


for count in (1, 4) if jax.device_count() >= 4 else (1,):
    on = f" on {count}"
    over = functools.partial(sharded, count=count)
    loss(
        f"shard_map, weight replicated{on}",
        lambda a, over=over: over(jnp.matmul, in_specs=(P("d"), P()), out_specs=P("d"))(x(4, 4), a),
        fused=True,
    )
    loss(
        f"shard_map, weight closed over{on}",
        lambda a, over=over: over(lambda y: y @ a, in_specs=P("d"), out_specs=P("d"))(x(4, 4)),
        fused=True,
        slow=count == 4,
    )
    loss(
        f"shard_map, rows sharded, psum{on}",
        lambda a, over=over: over(
            lambda y, w: lax.psum(y @ w, "d"), in_specs=(P(None, "d"), P("d")), out_specs=P()
        )(x(3, 4), a),
    )
    loss(
        f"shard_map, columns sharded{on}",
        lambda b, over=over: over(jnp.matmul, in_specs=(P(), P(None, "d")), out_specs=P(None, "d"))(
            x(3, 6), b
        ),
    )
    loss(
        f"shard_map, no check{on}",
        lambda a, over=over: over(
            lambda y, w: lax.pmean(y @ w, "d"),
            in_specs=(P("d"), P()),
            out_specs=P(),
            check_vma=False,
        )(x(4, 4), a),
    )
    loss(
        f"shard_map, all_gather of a weight{on}",
        lambda a, over=over: over(
            lambda w: x(3, 4) @ lax.all_gather(w, "d", tiled=True),
            in_specs=P("d"),
            out_specs=P(),
            check_vma=False,
        )(a),
        slow=count == 1,
    )
    loss(
        f"shard_map over a scan{on}",
        lambda s, over=over: over(
            lambda y, s: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, s)[0],
            in_specs=(P("d"), P()),
            out_specs=P("d"),
        )(x(4, 4), s),
        fused=True,
    )
    loss(
        f"shard_map that returns weights{on}",
        lambda a, over=over: over(lambda w: w, in_specs=P("d"), out_specs=P("d"))(a),
        slow=count == 4,
    )
    loss(
        f"pmap over data{on}",
        lambda a, count=count: jax.pmap(
            lambda y, w: y @ w, in_axes=(0, None), devices=jax.devices()[:count]
        )(x(count, 3, 4), a),
        slow=count == 4,
    )
    loss(
        f"with_sharding_constraint of a weight{on}",
        lambda a, count=count: (
            x(3, 4) @ lax.with_sharding_constraint(a, NamedSharding(mesh(count), P("d")))
        ),
        slow=count == 1,
    )
    loss(
        f"with_sharding_constraint of data{on}",
        lambda a, count=count: lax.with_sharding_constraint(
            x(4, 4) @ a, NamedSharding(mesh(count), P("d"))
        ),
        fused=True,
        slow=count == 1,
    )
    loss(
        f"jit with in_shardings{on}",
        lambda a, count=count: jax.jit(
            jnp.matmul, in_shardings=(NamedSharding(mesh(count), P()),) * 2
        )(x(4, 4), a),
        slow=count == 1,
    )
    loss(
        f"jit with out_shardings{on}",
        lambda a, count=count: jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh(count), P()))(
            x(4, 4), a
        ),
        slow=True,
    )


@loss("explicit sharding", slow=True)
def _(a):
    explicit = jax.make_mesh((1,), ("d",), (AxisType.Explicit,), devices=jax.devices()[:1])
    data, w = (jax.sharding.reshard(y, NamedSharding(explicit, P("d"))) for y in (x(4, 4), a))
    return jnp.sum(jnp.einsum("bi,io->bo", data, w, out_sharding=NamedSharding(explicit, P())) ** 2)


loss("device_put of a weight", lambda a: x(3, 4) @ jax.device_put(a, jax.devices()[0]))
loss(
    "pmap over an ensemble",
    lambda s: jax.pmap(lambda w: lax.psum(x(2, 4) @ w, "n"), "n", devices=jax.devices()[:1])(s[:1]),
    slow=True,
)
