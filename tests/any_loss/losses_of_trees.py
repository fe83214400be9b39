"""Trees of parameters: any container, leaves that are no weights, unusual shapes."""

import dataclasses
import typing

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loss_table import kind, tree_of, x

loss = kind("trees")


class Layer(typing.NamedTuple):
    w: typing.Any
    b: typing.Any


@flax.struct.dataclass
class Flax:
    w: typing.Any
    scale: typing.Any
    name: str = flax.struct.field(pytree_node=False, default="f")


@chex.dataclass
class Chex:
    w: typing.Any
    b: typing.Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    w: typing.Any
    b: typing.Any


def dense(p):
    return jnp.tanh(x(3, 4) @ p.w + p.b)


AB = {"w": (4, 6), "b": (6,)}
loss("dict", lambda p: x(3, 4) @ p["w"] + p["b"], params=lambda: tree_of(AB))
loss("list", lambda p: x(3, 4) @ p[0] @ p[1], params=lambda: tree_of([(4, 6), (6, 2)]), fused=True)
loss(
    "a list of dicts",
    lambda p: (x(3, 4) @ p[0]["w"] + p[0]["b"]) @ p[1]["w"].T,
    params=lambda: [tree_of(AB), tree_of({"w": (2, 6)})],
)
loss(
    "tuple, unpacked",
    lambda p: (lambda w, v: x(3, 4) @ w @ v)(*p),
    params=lambda: tuple(tree_of([(4, 6), (6, 2)])),
    fused=True,
)
loss("namedtuple", dense, params=lambda: Layer(**tree_of(AB)))
loss(
    "namedtuple, replaced",
    lambda p: dense(p._replace(b=p.b * 2)),
    slow=True,
    params=lambda: Layer(**tree_of(AB)),
)
loss(
    "flax.struct",
    lambda p: x(3, 4) @ p.w * p.scale + len(p.name),
    params=lambda: Flax(*tree_of([(4, 6), (6,)])),
)
loss("chex.dataclass", dense, params=lambda: Chex(**tree_of(AB)))
loss("a registered dataclass", dense, params=lambda: Registered(**tree_of(AB)))
loss(
    "FrozenDict",
    lambda p: x(3, 4) @ p["params"]["w"],
    params=lambda: flax.core.freeze({"params": tree_of({"w": (4, 6)})}),
)
loss("a single leaf", lambda p: x(3, 4) @ p, params=lambda: tree_of((4, 6)), fused=True)
loss(
    "None beside weights",
    lambda p: x(3, 4) @ p["w"] if p["b"] is None else 0.0,
    params=lambda: {"w": tree_of((4, 6)), "b": None},
    fused=True,
)
loss(
    "Python scalars beside weights",
    lambda p: x(3, 4) @ p["w"] * p["scale"] + p["shift"],
    params=lambda: {"w": tree_of((4, 6)), "scale": 2.0, "shift": 1},
)
loss(
    "strings beside weights",
    lambda p: getattr(jnp, p["how"])(x(3, 4) @ p["w"]),
    params=lambda: {"w": tree_of((4, 6)), "how": "tanh"},
)
loss(
    "functions beside weights",
    lambda p: p["fn"](x(3, 4) @ p["w"]),
    params=lambda: {"w": tree_of((4, 6)), "fn": jnp.tanh},
)
loss(
    "integers and bools beside weights",
    lambda p: jnp.where(p["mask"], x(3, 4) @ p["w"][:, p["ids"]], 0.0),
    params=lambda: {
        "w": tree_of((4, 6)),
        "ids": jnp.array([0, 5, 2]),
        "mask": jnp.array([True, False, True]),
    },
)
loss(
    "keys beside weights",
    lambda p: x(3, 4) @ p["w"] + jax.random.normal(p["key"], (6,)),
    params=lambda: {"w": tree_of((4, 6)), "key": jax.random.key(1)},
)
loss(
    "numpy leaves beside weights",
    lambda p: p["x"] @ p["w"],
    params=lambda: {"w": tree_of((4, 6)), "x": np.ones((3, 4), np.int32)},
)
loss(
    "float leaves that are no weights",
    lambda p: (p["x"] - p["mean"]) @ p["w"],
    params=lambda: tree_of({"x": (3, 4), "mean": (4,), "w": (4, 6)}),
    where=lambda path: path == "['w']",
    fused=True,
)
loss(
    "empty arrays beside weights",
    lambda p: jnp.concatenate([x(3, 4) @ p["w"], p["empty"]]),
    params=lambda: {"w": tree_of((4, 6)), "empty": jnp.zeros((0, 6))},
    where=lambda path: path == "['w']",
    fused=True,
)
loss(
    "empty weights",
    lambda p: x(3, 0) @ p["e"] + x(3, 4) @ p["w"],
    params=lambda: tree_of({"w": (4, 6), "e": (0, 6)}),
)
loss(
    "weights of no columns",
    lambda p: jnp.sum(x(3, 4) @ p["e"]) + jnp.sum(x(3, 4) @ p["w"]),
    params=lambda: tree_of({"w": (4, 6), "e": (4, 0)}),
)
loss("scalars", lambda p: p["s"] * x(3) + p["t"] ** 2, params=lambda: tree_of({"s": (), "t": ()}))
loss(
    "scalars as exponents and shifts",
    lambda p: jnp.abs(x(3)) ** p["s"] - p["t"],
    slow=True,
    params=lambda: tree_of({"s": (), "t": ()}),
)
loss("vectors", lambda p: x(3, 6) @ p["v"] + p["b"], params=lambda: tree_of({"v": (6,), "b": (1,)}))
loss(
    "axes of size one",
    lambda p: x(3, 1) @ p["a"] @ p["b"],
    params=lambda: tree_of({"a": (1, 6), "b": (6, 1)}),
    fused=True,
)
loss(
    "axes of size one, broadcast",
    lambda p: x(3, 6) * p["a"] + p["b"] * p["a"],
    params=lambda: tree_of({"a": (1, 6), "b": (3, 1)}),
)
loss(
    "odd lengths",
    lambda p: jnp.tanh(x(3, 5) @ p["a"]) @ p["b"],
    params=lambda: tree_of({"a": (5, 7), "b": (7, 3)}),
    fused=True,
)
loss(
    "one weight, twice in the tree",
    lambda p: x(3, 4) @ p["a"] @ p["b"].T,
    params=lambda: dict.fromkeys("ab", tree_of((4, 6))),
    fused=True,
)
loss(
    "five axes",
    lambda p: jnp.einsum("abcde,edf->abcf", p, x(3, 2, 2)),
    params=lambda: tree_of((2, 1, 2, 2, 3)),
    fused=True,
)
loss(
    "leaves in a loop",
    lambda p: sum(jnp.sum(x(3, w.shape[0]) @ w) for w in jax.tree.leaves(p)),
    params=lambda: tree_of([(4, 6), (6, 2), (5, 1)]),
    fused=True,
)
loss(
    "stacked in the loss",
    lambda p: lax.scan(
        lambda c, w: (jnp.tanh(c @ w), None), x(2, 4), jax.tree.map(lambda *w: jnp.stack(w), *p)
    )[0],
    params=lambda: tree_of([(4, 4)] * 3),
)
loss(
    "state that is returned beside",
    lambda p: (x(3, 4) @ p["w"], {"w": p["w"], "n": 1}),
    params=lambda: tree_of({"w": (4, 6)}),
)
loss(
    "flatten and unflatten",
    lambda p: (lambda leaves, treedef: x(3, 4) @ jax.tree.unflatten(treedef, leaves)["w"])(
        *jax.tree.flatten(p)
    ),
    params=lambda: tree_of({"w": (4, 6)}),
    fused=True,
)
loss(
    "tree_map_with_path",
    lambda p: jax.tree_util.tree_map_with_path(lambda path, w: w * len(path), p),
    params=lambda: {"w": {"w": tree_of((4, 6))}},
)
loss(
    "isinstance of a leaf",
    lambda p: x(3, 4) @ p if isinstance(p, jax.Array) else jnp.nan,
    params=lambda: tree_of((4, 6)),
    fused=True,
)
loss(
    "jnp.asarray of a leaf",
    lambda p: x(3, 4) @ jnp.asarray(p),
    params=lambda: tree_of((4, 6)),
    fused=True,
)
loss("jnp.array of a leaf", lambda p: x(3, 4) @ jnp.array(p), params=lambda: tree_of((4, 6)))
loss(
    "a leaf as Python sees it",
    lambda p: x(3, len(p)) @ jnp.stack([*p]) * p.ndim,
    params=lambda: tree_of((4, 6)),
)
loss(
    "jax.typeof of a leaf",
    lambda p: x(3, 4) @ p * jax.typeof(p).shape[0],
    fused=True,
    params=lambda: tree_of((4, 6)),
)
loss(
    "dtypes of leaves",
    lambda p: jnp.ones((3, 4), p.dtype) @ p + jnp.finfo(p.dtype).eps,
    params=lambda: tree_of((4, 6), jnp.bfloat16),
    rtol=5e-2,
)
