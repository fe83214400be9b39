"""What moves, picks, repeats, joins or writes entries."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree
from loss_table import kind, x

loss = kind("movement")

for name, index in {
    "rows": np.s_[1:3],
    "columns": np.s_[:, 1:4],
    "strided rows": np.s_[::2],
    "strided columns": np.s_[:, ::3],
    "rows backwards": np.s_[::-1],
    "columns backwards": np.s_[:, ::-1],
    "strided backwards": np.s_[3:0:-2, 4::-3],
    "one row": np.s_[2],
    "the last row": np.s_[-1],
    "one column": np.s_[:, 2],
    "one entry": np.s_[1, 2],
    "a new axis": np.s_[:, None, 1:],
    "an ellipsis": np.s_[..., 3],
    "nothing": np.s_[:0],
    "rows by list": np.s_[np.array([3, 0, 0])],
    "rows by negative indices": np.s_[np.array([-1, -4])],
    "columns by list": np.s_[:, np.array([5, 0, 2])],
    "two lists": np.s_[np.array([0, 3]), np.array([5, 1])],
    "a list in two axes": np.s_[np.array([[0], [2]]), np.array([[1, 5]])],
    "a mask of rows": np.s_[np.array([True, False, True, False])],
    "a mask": np.s_[np.arange(24).reshape(4, 6) % 3 == 0],
}.items():
    # a mean, so that nothing is NaN only where nothing is there
    loss(
        f"indexed by {name}",
        lambda a, index=index: a[index] + 0.0,
        flat=name in ("nothing", "one entry"),
        slow=name in ("strided rows", "the last row", "an ellipsis", "a mask of rows"),
    )

BEYOND = np.array([[0, 6], [-1, 99], [-8, -99]])
for mode in ["clip", "fill", "wrap"]:
    loss(
        f"take, {mode}",
        lambda e, m=mode: jnp.nan_to_num(jnp.take(e, BEYOND, axis=0, mode=m), nan=7.0),
    )
    loss(
        f"take of columns, {mode}",
        lambda e, m=mode: jnp.nan_to_num(jnp.take(e, BEYOND, axis=1, mode=m), nan=7.0),
        slow=True,
    )
    if mode != "wrap":  # which take_along_axis does not know
        loss(
            f"take_along_axis, {mode}",
            lambda a, m=mode: jnp.nan_to_num(
                jnp.take_along_axis(a, jnp.array([[0, 5, -1, 8, -7, 2]]), axis=0, mode=m), nan=7.0
            ),
        )
loss("take with a fill value", lambda e: e.at[jnp.array([1, 70])].get(mode="fill", fill_value=-3.0))
loss("take without an axis", lambda a: jnp.take(a, jnp.array([0, 7, 23])))
loss("embedding", lambda e: jnp.tanh(e[jnp.array([[1, 2, 6], [0, 0, 5]])]), fused=True)
loss("embedding by one_hot", lambda e: jax.nn.one_hot(jnp.array([1, 6, 0]), 7) @ e, fused=True)
loss(
    "embedding bag",
    lambda e: jax.ops.segment_sum(e[jnp.array([1, 2, 6, 2])], jnp.array([0, 0, 1, 2]), 3),
    fused=True,
)
loss("embedding by a traced index", lambda e: e[jnp.argmax(x(7))])
loss("embedding that is the head, too", lambda e: e[jnp.array([1, 2])] @ e.T, fused=True)
loss("indices from a weight", lambda e, u: e[jnp.argsort(u)])
loss(
    "segment_sum of a weight", lambda e: jax.ops.segment_sum(e, jnp.array([0, 1, 0, 2, 2, 1, 0]), 3)
)
loss("where", lambda a: jnp.where(x(4, 6) > 0, a, 0.0))
loss("where by weights", lambda a, h: jnp.where(a > h.astype(jnp.float32), a, 2.0))
loss("choose and select", lambda a: jnp.select([a > 1, a > 0], [a, a * 2], 0.5), slow=True)
loss("piecewise", lambda a: jnp.piecewise(a, [a < 0], [lambda w: -w, jnp.sin]), slow=True)
loss("dynamic_slice", lambda e: lax.dynamic_slice(e, (jnp.argmax(x(3)), 1), (3, 3)))
loss("dynamic_slice out of bounds", lambda e: lax.dynamic_slice(e, (6, 9), (3, 5)))
loss("dynamic_update_slice into a weight", lambda e: lax.dynamic_update_slice(e, x(2, 2), (1, 2)))
loss("dynamic_update_slice of a weight", lambda a: lax.dynamic_update_slice(x(6, 6), a, (1, 0)))
for name in ["set", "add", "multiply", "max", "min"]:
    loss(
        f"at[].{name} in a weight",
        lambda a, name=name: getattr(a.at[1:3, 2], name)(0.3),
        slow=name == "min",
    )
    loss(
        f"at[].{name} of a weight",
        lambda a, name=name: getattr(x(9, 6).at[jnp.array([1, 1, 8, 30])], name)(a),
        slow=name in ("min", "max"),
    )
loss("at[].set of a weight in a weight", lambda q, s: s.at[1].set(q))
loss("at[].get and apply", lambda a: a.at[0].apply(jnp.sin), slow=True)
loss("a cache of keys written", lambda a: jnp.zeros((8, 6)).at[2:4].set(x(2, 4) @ a) @ a.T)
loss(
    "scatter_add of lax",
    lambda v: lax.scatter_add(
        x(4, 6), jnp.array([1]), v, lax.ScatterDimensionNumbers((0,), (0,), (0,))
    ),
)
loss("roll", lambda a: jnp.roll(a, 2, axis=0))
loss("roll of both axes", lambda a: jnp.roll(a, (1, -2), (0, 1)))
loss("roll, flattened", lambda a: jnp.roll(a, 5), slow=True)
loss("flip and rev", lambda a: lax.rev(jnp.flip(a, 0), (1,)))
loss("rot90", lambda a: jnp.rot90(a), slow=True)
loss("pad", lambda a: jnp.pad(a, ((1, 0), (0, 2))))
loss("pad, wrapped", lambda a: jnp.pad(a, 2, mode="wrap"), slow=True)
loss("pad, reflected", lambda a: jnp.pad(a, ((0, 0), (2, 2)), mode="reflect"))
loss("pad of lax, negative and inner", lambda a: lax.pad(a, 0.5, ((-1, 2, 1), (1, -1, 0))))
loss("pad by a weight", lambda a, t: lax.pad(a, t, ((1, 0, 0), (0, 0, 0))))
loss("concatenate two weights", lambda a, f: x(2, 8) @ jnp.concatenate([a, f.astype(jnp.float32)]))
loss("concatenate along the last axis", lambda a, q: jnp.concatenate([a, q], axis=1))
loss("concatenate a weight and floats", lambda a: x(2, 6) @ jnp.concatenate([a, jnp.ones((2, 6))]))
loss("stack", lambda a, b: jnp.stack([a, b.T], axis=1))
loss("block", lambda a, q: jnp.block([[a, q], [jnp.zeros((2, 10))]]))
loss(
    "hstack, vstack, dstack",
    lambda q: (jnp.hstack([q, q]), jnp.vstack([q, q]), jnp.dstack([q, q])),
    slow=True,
)
loss("split before the product", lambda g: [x(3, 6) @ w for w in jnp.split(g, 4, axis=-1)])
loss(
    "split after the product",
    lambda g: jnp.split(jnp.tanh(x(3, 6) @ g), 4, axis=-1)[::-1],
    fused=True,
)
loss("split of rows", lambda a: [x(3, 2) @ w for w in jnp.split(a, 2)], fused=True)
loss("lax.split", lambda g: lax.split(g, (5, 19), axis=1), slow=True)
loss("unstack", lambda s: [x(2, 4) @ w for w in jnp.unstack(s)])
loss("tile", lambda a: x(3, 8) @ jnp.tile(a, (2, 1)))
loss("tile of the last axis", lambda a: jnp.tile(a, 2), slow=True)
loss("repeat", lambda a: jnp.repeat(a, 2, axis=0))
loss(
    "repeat by counts",
    lambda a: jnp.repeat(a, jnp.array([0, 2, 1, 1]), axis=0, total_repeat_length=4),
)
loss("repeat of heads", lambda s: jnp.einsum("bhd,hdk->bhk", x(2, 6, 4), jnp.repeat(s, 2, axis=0)))
loss("broadcast_to", lambda v: jnp.broadcast_to(v, (3, 6)))
loss("broadcast_to of new leading axes", lambda a: x(2, 5, 4) @ jnp.broadcast_to(a, (2, 4, 6)))
loss("broadcast by adding", lambda v, u: v[None] + u[:, None])
for shape in [(24,), (6, 4), (2, 2, 6), (4, 2, 3), (4, 1, 6, 1), (3, 8), (1, 24)]:
    loss(
        f"reshape to {shape}",
        lambda a, shape=shape: jnp.sin(a.reshape(shape)),
        slow=shape == (1, 24),
    )
loss("reshape of a transpose", lambda a: a.T.reshape(4, 6))
loss("reshape, order F", lambda a: a.reshape((6, 4), order="F"), slow=True)
loss("ravel", lambda a: a.ravel() @ x(24))
loss("squeeze and expand_dims", lambda a: jnp.squeeze(jnp.expand_dims(a, (0, 2, -1)), (0, -1)))
loss("squeeze of a last axis", lambda a: x(4) @ jnp.squeeze(a[:, :1], -1))
loss("moveaxis", lambda s: jnp.moveaxis(s, -1, 0))
loss("swapaxes", lambda s: jnp.einsum("bi,nij->bnj", x(2, 4), jnp.swapaxes(s, 1, 2)), fused=True)
loss("transposes of a tree", lambda a, b: jax.tree.map(jnp.transpose, {"a": a, "b": b}))
loss("rearranged heads", lambda g: jnp.einsum("bi,ihd->bhd", x(2, 6), g.reshape(6, 4, 6)))
loss("pixel shuffle", lambda s: s.reshape(3, 2, 2, 4).transpose(0, 2, 1, 3).reshape(3, 4, 4))
loss("sort", lambda a: jnp.sort(a, axis=0))
loss("sort, descending", lambda a: jnp.sort(a, descending=True), slow=True)
loss("argsort", lambda a: jnp.argsort(a, axis=1), flat=True)
loss("lax.sort of pairs", lambda a, b: lax.sort((a, b.reshape(4, 6)), num_keys=1))
loss("top_k", lambda a: lax.top_k(a, 2))
loss("top_k gate of a product", lambda a: lax.top_k(x(3, 4) @ a, 2), fused=True)
loss("tril", lambda q: x(3, 4) @ jnp.tril(q))
loss("triu", lambda q: jnp.triu(q, 1))
loss("diag of a matrix", lambda q: jnp.diag(q))
loss("diag of a vector", lambda v: x(3, 6) @ jnp.diag(v))
loss(
    "diagonal and trace",
    lambda s: (jnp.diagonal(s, axis1=1, axis2=2), jnp.trace(s, axis1=1, axis2=2)),
)
loss("tril_indices", lambda q: jnp.zeros((4, 4)).at[jnp.tril_indices(4)].set(q.ravel()[:10]))
loss("skew-symmetric", lambda q: x(3, 4) @ (q - q.T))
loss("symmetric", lambda q: x(3, 4) @ (q + q.T) / 2)
loss("unique with a size", lambda v: jnp.unique(jnp.round(v), size=4, fill_value=0.0))
loss("nonzero with a size", lambda v: jnp.nonzero(v > 0, size=3), flat=True)
loss("searchsorted in a weight", lambda v: jnp.searchsorted(jnp.sort(v), x(5)), flat=True)
loss("searchsorted of a weight", lambda v: jnp.searchsorted(jnp.sort(x(9)), v), flat=True)
loss("digitize", lambda v: jnp.digitize(v, jnp.array([-1.0, 0.0, 1.0])), flat=True, slow=True)
loss("bincount of signs", lambda v: jnp.bincount((v > 0).astype(int), length=2), flat=True)
loss("meshgrid", lambda v, u: jnp.meshgrid(v, u), slow=True)
loss("ix_", lambda a: a[jnp.ix_(jnp.array([0, 2]), jnp.array([1, 5]))])
loss(
    "insert, delete, append",
    lambda v: (jnp.insert(v, 2, 0.5), jnp.delete(v, 1), jnp.append(v, 3.0)),
)
loss("vander", lambda u: jnp.vander(u), slow=True)
loss("pooling", lambda s: lax.reduce_window(s, -jnp.inf, lax.max, (1, 2, 2), (1, 2, 2), "VALID"))
loss("interleave", lambda q, s: jnp.stack([q, s[0]], axis=-1).reshape(4, 8))
loss("rotary embedding of a weight", lambda q: jnp.concatenate([-q[:, 2:], q[:, :2]], -1) + q)

# Trees as one
loss("ravel_pytree", lambda a, v, t: ravel_pytree({"a": a, "v": v, "t": t})[0])
loss(
    "ravel_pytree and back", lambda a, v: (lambda flat, back: back(flat * 2))(*ravel_pytree((a, v)))
)
loss(
    "global norm",
    lambda a, v, t: jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves((a, v, t)))),
)
loss(
    "weight decay beside a product",
    lambda a, v: jnp.mean((x(3, 4) @ a + v) ** 2) + 0.1 * sum(jnp.sum(leaf**2) for leaf in (a, v)),
)
loss("l1 and group lasso", lambda a: jnp.abs(a).sum() + jnp.linalg.norm(a, axis=1).sum())
loss("optax's norm of a tree", lambda a, v: optax.tree.norm((a, v)), slow=True)
loss(
    "tree.reduce", lambda a, v: jax.tree.reduce(lambda total, leaf: total + leaf.sum(), (a, v), 0.0)
)
loss("tree.map of two trees", lambda a, b: jax.tree.map(lambda p, q: p - q.T, {"w": a}, {"w": b}))
loss(
    "distance to a start",
    lambda a, v: sum(jnp.sum((leaf - x(*leaf.shape)) ** 2) for leaf in (a, v)),
)
