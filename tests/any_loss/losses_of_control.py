"""Control flow with weights anywhere in it, vmaps over weights and look-ups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loss_table import kind, x

loss = kind("control")


def layer(c, w):
    return jnp.tanh(c @ w), None


def through(stack, **more):
    """A scan over layers, with a body of its own, so that nothing is remembered of others."""
    return lax.scan(lambda c, w: layer(c, w), x(2, 4), stack, **more)[0]


# Scans
loss("scan over layers", lambda s: through(s), fused=True)
loss(
    "scan, weight closed over",
    lambda q: lax.scan(lambda c, y: (jnp.tanh(c @ q + y), c), x(2, 4), x(3, 2, 4)),
    fused=True,
)
loss(
    "scan without xs",
    lambda q: lax.scan(lambda c, _: (jnp.tanh(c @ q), None), x(2, 4), None, length=3)[0],
    fused=True,
)
loss("scan, reverse", lambda s: through(s, reverse=True), fused=True)
loss("scan, unrolled", lambda s: through(s, unroll=2), fused=True)
loss("scan, wholly unrolled", lambda s: through(s, unroll=True), fused=True, slow=True)
loss("scan of length 1", lambda s: through(s[:1]), fused=True)
loss("scan of length 0", lambda s, q: through(s[:0]) @ q)
loss(
    "scan, weight as a carry that stays",
    lambda q: lax.scan(
        lambda c, y: ((c[0], jnp.tanh(c[1] @ c[0] + y)), None), (q, x(2, 4)), x(3, 2, 4)
    )[0][1],
    fused=True,
)
loss(
    "scan, weight as a carry that changes",
    lambda q: lax.scan(lambda c, y: (c * 0.9 + y, c @ x(4, 2)), q, x(3, 4, 4)),
)
loss(
    "scan, weight as a carry transposed",
    lambda q: lax.scan(lambda c, y: (c.T, y @ c), q, x(3, 2, 4)),
)
loss(
    "scan, two weights swapped",
    lambda q, s: lax.scan(lambda c, y: ((c[1], c[0]), y @ c[0]), (q, s[0]), x(3, 2, 4))[1],
)
loss("scan, layers as ys", lambda s: lax.scan(lambda c, w: (c, w), 0.0, s)[1])
loss("scan, a weight as ys", lambda q: lax.scan(lambda c, y: (c, q), 0.0, x(2))[1])
loss("scan, transposed layers as ys", lambda s: lax.scan(lambda c, w: (c, w.T), 0.0, s)[1])
loss(
    "scan in scan",
    lambda r: lax.scan(lambda c, s: (lax.scan(lambda *cw: layer(*cw), c, s)[0], None), x(2, 4), r)[
        0
    ],
    fused=True,
)
loss("scan over a stack of stacks, reshaped", lambda r: through(r.reshape(6, 4, 4)), fused=True)
loss(
    "scan over a reshaped stack",
    lambda s: lax.scan(
        lambda c, w: (c + jnp.tanh(x(2, 4) @ w), None),
        jnp.zeros((2, 4)),
        s.reshape(6, 2, 4).reshape(3, 4, 4),
    )[0],
    fused=True,
)
loss("scan over rows", lambda a: lax.scan(lambda c, row: (c + x(6) @ row, row), 0.0, a))
loss("scan over scalars", lambda v: lax.scan(lambda c, y: (c * 0.5 + y, c * y), 0.0, v))
loss("scan, moveaxis before", lambda s: through(jnp.moveaxis(s.transpose(1, 2, 0), -1, 0)))
loss(
    "scan over a moved axis",
    lambda s: lax.scan(
        lambda c, w: (c + x(2, 3) @ w, None), jnp.zeros((2, 4)), jnp.moveaxis(s, 1, 0)
    )[0],
)
loss(
    "scan over the last axis, moved",
    lambda s: lax.scan(
        lambda c, w: (c + x(2, 3) @ w, None), jnp.zeros((2, 4)), jnp.moveaxis(s, -1, 0)
    )[0],
)
loss("scan over a transposed stack", lambda s: through(s.transpose(0, 2, 1)))
loss(
    "scan over swapped axes",
    lambda r: lax.scan(
        lambda c, s: (jnp.einsum("bi,nij->bj", c, s), None), x(2, 4), jnp.swapaxes(r, 0, 1)
    )[0],
)
loss(
    "scan over a stack in bfloat16",
    lambda s: lax.scan(lambda *cw: layer(*cw), x(2, 4, dtype=jnp.bfloat16), s.astype(jnp.bfloat16))[
        0
    ],
    fused=True,
    rtol=5e-2,
)
loss(
    "scan, dict of xs",
    lambda s, a: lax.scan(
        lambda c, w: (jnp.tanh(c @ w["w"]) + w["b"], w["i"]),
        x(2, 4),
        {"w": s, "b": a[:3, :4], "i": jnp.arange(3), "none": None},
    )[0],
)
loss("scan over a concatenated stack", lambda s, q: through(jnp.concatenate([s, q[None]])))
loss("scan over a stack of weights", lambda q, s: through(jnp.stack([q, s[0], q])))
loss("scan over a slice of a stack", lambda s: through(s[1:]), fused=True)
loss("scan over a flipped stack", lambda s: through(s[::-1]))
loss("scan over a tiled stack", lambda q: through(jnp.broadcast_to(q, (3, 4, 4))))
loss("scan over a looked-up stack", lambda s: through(s[np.array([2, 0, 0, 1])]))
loss(
    "scan, layers by index",
    lambda s: lax.scan(lambda c, i: (jnp.tanh(c @ s[i]), None), x(2, 4), jnp.arange(3))[0],
)
loss(
    "scan, layers by dynamic_index_in_dim",
    lambda s: lax.scan(
        lambda c, i: (jnp.tanh(c @ lax.dynamic_index_in_dim(s, i, keepdims=False)), None),
        x(2, 4),
        jnp.arange(3),
    )[0],
    fused=True,
)
loss(
    "scan, carry written with layers",
    lambda s: lax.scan(
        lambda c, i: (c.at[i].set(s[i].T), None), jnp.zeros((3, 4, 4)), jnp.arange(3)
    )[0],
)
loss(
    "scan of a scan of a scan",
    lambda r: lax.scan(
        lambda c, _: (
            lax.scan(lambda c, s: (lax.scan(lambda *cw: layer(*cw), c, s)[0], None), c, r)[0],
            None,
        ),
        x(2, 4),
        None,
        length=2,
    )[0],
    fused=True,
    slow=True,
)
loss(
    "scan whose carry begins as a weight",
    lambda q: lax.scan(lambda *cw: layer(*cw), q, x(3, 4, 4))[0],
)
loss(
    "LSTM",
    lambda g: lax.scan(
        lambda c, y: lstm(g[:, :16].reshape(6, 16), c, y), (jnp.zeros(4), jnp.zeros(4)), x(3, 2)
    )[1],
)


def lstm(w, carry, y):
    h, c = carry
    i, f, o, n = jnp.split(jnp.concatenate([h, y]) @ w, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(n)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


loss("associative_scan of weights", lambda s: lax.associative_scan(jnp.matmul, s))
loss(
    "associative_scan of decays",
    lambda a: lax.associative_scan(
        lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), (jax.nn.sigmoid(a), x(4, 6))
    ),
    slow=True,
)

# Loops
loss("fori_loop", lambda q: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ q), x(2, 4)), fused=True)
loss(
    "fori_loop, weight indexed",
    lambda s: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ s[i]), x(2, 4)),
)
loss(
    "fori_loop, dynamic count",
    lambda q: lax.fori_loop(0, jnp.sum(x(4) > -9), lambda i, c: jnp.tanh(c @ q), x(2, 4)),
    fused=True,
)
loss(
    "fori_loop, count of a weight",
    lambda q: lax.fori_loop(0, jnp.sum(q > 0), lambda i, c: jnp.tanh(c @ q), x(2, 4)),
)
loss("fori_loop, weight as carry", lambda q: lax.fori_loop(0, 3, lambda i, c: c @ c / 4, q))
loss(
    "fori_loop, weight as a carry that stays",
    lambda q: lax.fori_loop(0, 3, lambda i, c: (jnp.tanh(c[0] @ c[1]), c[1]), (x(2, 4), q))[0],
)
loss(
    "while_loop, weight in the body",
    lambda q: lax.while_loop(
        lambda c: c[1] < 3, lambda c: (jnp.tanh(c[0] @ q), c[1] + 1), (x(2, 4), 0)
    )[0],
    fused=True,
)
loss(
    "while_loop, vmapped: each ends on its own",
    lambda q: jax.vmap(
        lambda row, ends: lax.while_loop(
            lambda c: c[1] < ends, lambda c: (jnp.tanh(c[0] @ q), c[1] + 1), (row, 0)
        )[0]
    )(x(3, 4), jnp.array([0, 3, 1])),
    fused=True,
)
loss(
    "while_loop, vmapped: a weight is the carry",
    lambda q: jax.vmap(
        lambda ends: lax.while_loop(
            lambda c: c[1] < ends, lambda c: (jnp.tanh(c[0] @ q), c[1] + 1), (q, 0)
        )[0]
    )(jnp.array([0, 3, 1])),
)
loss(
    "while_loop, weight in the condition",
    lambda v: lax.while_loop(lambda c: jnp.sum(c) < jnp.sum(v**2), lambda c: c + 1.0, x(3)),
    flat=True,
)
loss(
    "while_loop, product in the condition",
    lambda q: (
        lax.while_loop(
            lambda c: (jnp.max(c[0] @ q) < 9.0) & (c[1] < 4),
            lambda c: (c[0] + 1.0, c[1] + 1),
            (x(2, 4), 0),
        )[0]
        @ q
    ),
    fused=True,
)
loss(
    "while_loop, weights swapped",
    lambda q, s: lax.while_loop(
        lambda c: c[3] < 3,
        lambda c: (c[1], c[0], jnp.tanh(c[2] @ c[0]), c[3] + 1),
        (q, s[0], x(2, 4), 0),
    )[2],
)
loss(
    "while_loop, weight with floats swapped",
    lambda q: lax.while_loop(lambda c: c[2] < 3, lambda c: (c[1], c[0], c[2] + 1), (q, x(4, 4), 0))[
        :2
    ],
)
loss(
    "power iteration",
    lambda a: lax.fori_loop(
        0, 4, lambda i, v: (lambda w: w / jnp.linalg.norm(w))(a.T @ (a @ v)), x(6)
    ),
    rtol=2e-4,
)
loss("python loops", lambda s: functools.reduce(lambda c, w: jnp.tanh(c @ w), s, x(2, 4)))
loss(
    "python loop over indices",
    lambda s: functools.reduce(lambda c, i: jnp.tanh(c @ s[i]), range(3), x(2, 4)),
    fused=True,
)

# Branches
yes = lambda: x(4)[0] < 9  # noqa: E731
loss(
    "cond, products",
    lambda a: lax.cond(yes(), lambda w: x(3, 4) @ w, lambda w: x(3, 4, seed=1) @ w * 2, a),
    fused=True,
)
loss(
    "cond, weights closed over",
    lambda q, s: lax.cond(yes(), lambda: x(3, 4) @ q, lambda: x(3, 4) @ s[1]),
    fused=True,
)
loss("cond by a weight", lambda a: lax.cond(a[0, 0] > 0, lambda: x(3, 4) @ a, lambda: -x(3, 4) @ a))
loss(
    "cond returns a weight or another",
    lambda q, s: x(3, 4) @ lax.cond(yes(), lambda: q, lambda: s[0]),
)
loss(
    "cond returns a weight or its transpose",
    lambda q: x(3, 4) @ lax.cond(yes(), lambda w: w.T, lambda w: w, q),
)
loss(
    "cond returns a weight or floats",
    lambda q: x(3, 4) @ lax.cond(yes(), lambda w: w, lambda w: jnp.zeros_like(w), q),
)
loss(
    "cond returns the same weight", lambda q: x(3, 4) @ lax.cond(yes(), lambda w: w, lambda w: w, q)
)
loss(
    "cond in vmap becomes select",
    lambda q, s: jax.vmap(lambda y: lax.cond(y[0] > 0, lambda: y @ q, lambda: y @ s[0]))(x(5, 4)),
)
loss(
    "cond in vmap returns weights",
    lambda q, s: jax.vmap(lambda y: y @ lax.cond(y[0] > 0, lambda: q, lambda: s[0]))(x(5, 4)),
)
loss(
    "switch over layers",
    lambda s: lax.switch(jnp.argmax(x(3)), [lambda y, i=i: y @ s[i] for i in range(3)], x(2, 4)),
    fused=True,
)
loss(
    "switch returns weights",
    lambda q, s: (
        x(2, 4)
        @ lax.switch(jnp.argmax(x(3)) % 2, [lambda: q, lambda: s[0].T, lambda: jnp.ones((4, 4))])
    ),
)
loss("select of weights", lambda q, s: lax.select(x(4, 4) > 0, q, s[2]))
loss("select_n by a number", lambda q, s: x(2, 4) @ lax.select_n(jnp.int32(2), q, s[1], s[2]))
loss(
    "scan with a cond",
    lambda s: lax.scan(
        lambda c, w: (lax.cond(c.sum() > 0, lambda: jnp.tanh(c @ w), lambda: jnp.sin(c @ w)), None),
        x(2, 4),
        s,
    )[0],
    fused=True,
)
loss(
    "scan with a switch of layers",
    lambda r: lax.scan(
        lambda c, w: (
            lax.switch(jnp.argmax(c[0, :3]), [lambda i=i: jnp.tanh(c @ w[i]) for i in range(3)]),
            None,
        ),
        x(2, 4),
        r,
    )[0],
    fused=True,
    slow=True,
)
loss(
    "platform_dependent",
    lambda a: lax.platform_dependent(a, cpu=lambda a: x(3, 4) @ a, default=lambda a: x(3, 4) @ a),
)

# Maps
loss("lax.map over data", lambda a: lax.map(lambda y: y @ a, x(5, 4)), fused=True)
loss("lax.map over layers", lambda s: lax.map(lambda w: x(2, 4) @ w, s), fused=True)
loss("lax.map in batches", lambda a: lax.map(lambda y: y @ a, x(5, 4), batch_size=2), fused=True)
loss("lax.map over layers in batches", lambda s: lax.map(lambda w: x(2, 4) @ w, s, batch_size=2))
loss("vmap over data", lambda a: jax.vmap(lambda y: y @ a)(x(5, 4)), fused=True)
loss("vmap over an ensemble", lambda s: jax.vmap(lambda w: jnp.tanh(x(2, 4) @ w))(s), fused=True)
loss("vmap over an ensemble and data", lambda s: jax.vmap(jnp.matmul)(x(3, 2, 4), s), fused=True)
loss("vmap over columns", lambda a: jax.vmap(lambda w: jnp.sin(x(3, 4) @ w), 1, 1)(a))
loss("vmap over the last axis", lambda s: jax.vmap(lambda w: x(2, 3) @ w, -1)(s))
loss(
    "vmap, in_axes None", lambda a: jax.vmap(lambda y, w: y @ w, (0, None))(x(5, 4), a), fused=True
)
loss("vmap in vmap", lambda r: jax.vmap(jax.vmap(lambda w: x(2, 4) @ w))(r), fused=True)
loss(
    "vmap in vmap, axes crossed",
    lambda r: jax.vmap(jax.vmap(lambda w, y: y @ w, (0, None)), (1, 0))(r, x(3, 2, 4)),
)
loss("vmap, out_axes=1", lambda s: jax.vmap(lambda w: x(2, 4) @ w, out_axes=1)(s))
loss("vmap of weights returns them", lambda s: jax.vmap(lambda w: w.T, out_axes=-1)(s))
loss(
    "vmap over a dict",
    lambda s, a: jax.vmap(lambda p: x(2, 4) @ p["w"] + p["b"])({"w": s, "b": a[:3, :4]}),
)
loss("vmap of an elementwise function", lambda a: jax.vmap(jnp.sin)(a), slow=True)
for name in ["psum", "pmean", "pmax", "all_gather"]:
    loss(
        f"vmap with {name}",
        lambda s, name=name: jax.vmap(
            lambda w: getattr(lax, name)(x(2, 4) @ w, "n"), axis_name="n"
        )(s),
        slow=name == "pmax",
    )
loss(
    "vmap with psum of weights",
    lambda s: jax.vmap(lambda w: x(2, 4) @ (w - lax.pmean(w, "n")), axis_name="n")(s),
)
loss(
    "vmap with axis_index",
    lambda s: jax.vmap(lambda w: x(2, 4) @ w * lax.axis_index("n"), axis_name="n")(s),
    slow=True,
)
loss(
    "vmap with ppermute",
    lambda s: jax.vmap(
        lambda w: x(2, 4) @ lax.ppermute(w, "n", [(0, 1), (1, 2), (2, 0)]), axis_name="n"
    )(s),
    slow=True,
)
loss("vmap of look-ups", lambda e: jax.vmap(lambda i: e[i])(jnp.array([[1, 5], [6, 0]])))
loss(
    "vmap of look-ups in an ensemble",
    lambda s: jax.vmap(lambda w, i: w[i])(s, jnp.array([1, 3, 0])),
)
loss(
    "vmap of dynamic slices",
    lambda e: jax.vmap(lambda i: lax.dynamic_slice(e, (i, 0), (2, 5)))(jnp.array([1, 4])),
)
loss(
    "vmap over layers in a scan",
    lambda r: lax.scan(lambda c, s: (jax.vmap(jnp.matmul)(c, s), None), x(3, 2, 4), r)[0],
    fused=True,
)
loss("scan over layers in a vmap", lambda r: jax.vmap(lambda s: through(s))(r), fused=True)
loss(
    "scan over layers in a vmap over data",
    lambda s: jax.vmap(lambda y: lax.scan(lambda *cw: layer(*cw), y, s)[0])(x(5, 4)),
    fused=True,
)
loss(
    "vmap, spmd_axis_name",
    lambda a: jax.vmap(lambda y: y @ a, spmd_axis_name="n")(x(5, 4)),
    slow=True,
)
loss(
    "vectorize",
    lambda s: jnp.vectorize(jnp.matmul, signature="(n,m),(m,k)->(n,k)")(x(2, 4), s),
    slow=True,
)


# What was traced before
loss("scan with a body that was known before", lambda s: lax.scan(layer, x(2, 4), s)[0], fused=True)
loss(
    "scan with a known body over fewer layers",
    lambda s: lax.scan(layer, lax.scan(layer, x(2, 4), s)[0], s[1:])[0],
    fused=True,
)
loss(
    "scan with a known body over floats and weights",
    lambda s: lax.scan(layer, lax.scan(layer, x(2, 4), x(3, 4, 4))[0], s)[0],
    fused=True,
)
