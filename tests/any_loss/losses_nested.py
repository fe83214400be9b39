"""A product under every pair of what can stand around it: each must keep the weight implicit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from loss_table import kind, x

loss = kind("nested")


def product(y, w):
    return jnp.tanh(y @ w)


def custom_vjp(step):
    @jax.custom_vjp
    def fn(y, w):
        return step(y, w)

    fn.defvjp(lambda y, w: (step(y, w), (y, w)), lambda kept, g: jax.vjp(step, *kept)[1](g))
    return fn


def custom_jvp(step):
    fn = jax.custom_jvp(step)
    fn.defjvp(lambda primals, tangents: jax.jvp(step, primals, tangents))
    return fn


def scan(step):
    return lambda y, w: lax.scan(lambda c, z: (step(c + z, w), None), y, x(2, 1, 4))[0]


def while_loop(step):
    return lambda y, w: lax.while_loop(
        lambda c: c[1] < 2, lambda c: (step(c[0], w), c[1] + 1), (y, 0)
    )[0]


def fori_loop(step):
    return lambda y, w: lax.fori_loop(0, 2, lambda i, c: step(c, w), y)


def cond(step):
    return lambda y, w: lax.cond(y.sum() < 99, lambda: step(y, w), lambda: step(2 * y, w))


def switch(step):
    return lambda y, w: lax.switch(
        jnp.argmax(y[0, :3]), [lambda y, w, n=n: step(n + y, w) for n in range(3)], y, w
    )


def remat(step):
    return jax.checkpoint(step)


def jit(step):
    return jax.jit(step)


def vmap(step):
    return lambda y, w: jax.vmap(lambda z: step(z[None], w)[0])(y)


def shard_map(step):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    return lambda y, w: jax.shard_map(
        step, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False
    )(y, w)


def gradient(step):
    return lambda y, w: jax.grad(lambda y: jnp.sum(step(y, w)))(y)


AROUND = [
    scan,
    while_loop,
    fori_loop,
    cond,
    switch,
    remat,
    custom_vjp,
    custom_jvp,
    jit,
    vmap,
    shard_map,
    gradient,
]
for i, outer in enumerate(AROUND):
    for j, inner in enumerate(AROUND):
        if "gradient" in (outer.__name__, inner.__name__) and while_loop in (outer, inner):
            continue  # reverse mode has no while_loop
        if outer is inner is shard_map:
            continue  # one mesh within the same one
        loss(
            f"{inner.__name__} in {outer.__name__}",
            lambda q, outer=outer, inner=inner: outer(inner(product))(x(2, 4), q),
            fused=True,
            slow=(i + 2 * j) % 4 != 0,
            rtol=2e-4,
        )
for i, outer in enumerate(AROUND):
    loss(
        f"scan over layers in {outer.__name__}",
        lambda s, outer=outer: outer(
            lambda y, s: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), y, s)[0]
        )(x(2, 4), s),
        fused=True,
        slow=i % 2 == 1,
        rtol=2e-4,
    )
