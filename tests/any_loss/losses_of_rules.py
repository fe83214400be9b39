"""Custom rules, derivatives inside a loss, checkpoints, inner jits, callbacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import checkify, io_callback
from jax.experimental.ode import odeint
from loss_table import kind, x

loss = kind("rules")


@jax.custom_jvp
def softly(y):
    return jnp.log1p(jnp.exp(y))


@softly.defjvp
def _(primals, tangents):
    return softly(*primals), jax.nn.sigmoid(primals[0]) * tangents[0]


@jax.custom_vjp
def linear(data, w):
    return data @ w


linear.defvjp(lambda data, w: (data @ w, (data, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))


@jax.custom_vjp
def rounded(w):
    return jnp.round(4.0 * w) / 4.0


rounded.defvjp(lambda w: (rounded(w), None), lambda _, g: (g,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def applied(fn, w, times):
    return fn(w) * times


applied.defvjp(
    lambda fn, w, times: (fn(w) * times, w), lambda fn, times, w, g: (jax.vjp(fn, w)[1](g)[0],)
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def power(w, n):
    return w**n


@power.defjvp
def _(n, primals, tangents):
    return power(primals[0], n), n * power(primals[0], n - 1) * tangents[0]


@jax.custom_jvp
def blend(y, w):
    return y * w + w


blend.defjvps(lambda dy, out, y, w: dy * w, lambda dw, out, y, w: dw * (y + 1.0))


@jax.custom_vjp
def remembered(data, w):
    return jnp.sin(data @ w)


def _remember(data, w):
    out = data @ w
    return jnp.sin(out), (data, w, jnp.cos(out))


remembered.defvjp(
    _remember,
    lambda kept, g: ((g * kept[2]) @ kept[1].T, kept[0].T @ (g * kept[2])),
    optimize_remat=True,
)


@jax.custom_batching.custom_vmap
def batched_linear(data, w):
    return data @ w


@batched_linear.def_vmap
def _(size, in_batched, data, w):
    del size
    fn = jax.vmap(jnp.matmul, [0 if batched else None for batched in in_batched])
    return fn(data, w), True


@jax.custom_gradient
def clipped(w):
    return w @ jnp.ones((6, 2)), lambda g: (jnp.clip(g, -1, 1) @ jnp.ones((2, 6)),)


loss("custom_jvp of a product", lambda a: softly(x(3, 4) @ a), fused=True)
loss("custom_jvp of a weight", lambda a: softly(a), slow=True)
loss("custom_jvp with defjvps", lambda a: blend(x(4, 6), a))
loss("custom_jvp with a nondiff argument", lambda a: power(a, 3), slow=True)
loss("custom_vjp with a weight", lambda a: linear(x(3, 4), a), fused=True)
loss("custom_vjp on data alone", lambda a: rounded(x(3, 4)) @ a, fused=True)
loss("custom_vjp with nondiff arguments", lambda a: applied(jnp.sin, a, 2.0))
loss("custom_vjp that optimizes remat", lambda a: remembered(x(3, 4), a), fused=True)
loss(
    "custom_vjp, differentiated",
    lambda a: jax.grad(lambda data: jnp.sum(linear(data, a) ** 2))(x(3, 4)),
)
loss(
    "custom_vjp that optimizes remat, differentiated",
    lambda a: jax.grad(lambda data: jnp.sum(remembered(data, a)))(x(3, 4)),
)
loss("custom_vjp in a vmap", lambda a: jax.vmap(lambda row: linear(row, a))(x(3, 4)))
loss(
    "custom_vmap, weight not batched", lambda a: jax.vmap(batched_linear, (0, None))(x(2, 3, 4), a)
)
loss("custom_vmap, weight batched", lambda s: jax.vmap(batched_linear)(x(3, 2, 4), s))
loss("custom_vmap without a vmap", lambda a: batched_linear(x(3, 4), a), fused=True)
loss("custom_gradient", lambda a: clipped(a))
loss("stop_gradient of a weight", lambda a: x(3, 4) @ lax.stop_gradient(a), fused=True)
loss("straight-through rounding", lambda a: x(3, 4) @ (a + lax.stop_gradient(jnp.round(a) - a)))
loss("straight-through custom_vjp", lambda a: x(3, 4) @ rounded(a))
loss(
    "straight-through signs",
    lambda a: x(3, 4) @ (jnp.sign(a) * lax.stop_gradient(jnp.abs(a).mean())),
)


def definite(q):
    return q @ q.T + 3.0 * jnp.eye(4)


@loss("custom_linear_solve with an operator of a weight")
def _(q, u):
    m = definite(q)
    solve = lambda matvec, b: jnp.linalg.solve(jax.jacobian(matvec)(b), b)  # noqa: E731
    return lax.custom_linear_solve(lambda y: m @ y, u, solve, symmetric=True)


@loss("conjugate gradients through an implicit weight", rtol=1e-3)
def _(q, u):
    return jax.scipy.sparse.linalg.cg(lambda y: q.T @ (q @ y) + 3.0 * y, u, maxiter=6)[0]


@loss("gmres", slow=True, rtol=1e-3)
def _(q, u):
    return jax.scipy.sparse.linalg.gmres(lambda y: q @ y + 8.0 * y, u, maxiter=2)[0]


@loss("custom_root", rtol=1e-3)
def _(u):
    def newton(f, start):
        step = lambda _, y: y - f(y) / jax.jvp(f, (y,), (jnp.ones_like(y),))[1]  # noqa: E731
        return lax.fori_loop(0, 8, step, start)

    f = lambda y: y**3 + y - u  # noqa: E731
    return lax.custom_root(f, jnp.zeros(4), newton, lambda g, y: y / g(jnp.ones_like(y)))


@loss("a fixed point as in deep equilibria", rtol=1e-3)
def _(q):
    step = lambda z: jnp.tanh(0.1 * z @ q + x(3, 4))  # noqa: E731
    return lax.while_loop(
        lambda state: (jnp.abs(state[0] - state[1]).max() > 1e-6) & (state[2] < 30),
        lambda state: (step(state[0]), state[0], state[2] + 1),
        (x(3, 4), jnp.zeros((3, 4)), 0),
    )[0]


# Derivatives
net = lambda data, a, b: jnp.tanh(data @ a) @ b  # noqa: E731
loss("gradient by the input", lambda a: jax.grad(lambda y: jnp.sum(jnp.sin(y @ a)))(x(3, 4)))
loss("gradient by a weight", lambda a, b: jax.grad(lambda a: jnp.sum(net(x(3, 4), a, b) ** 2))(a))
loss(
    "gradient by all weights",
    lambda a, b: jax.grad(lambda tree: jnp.sum(net(x(3, 4), *tree) ** 2))((a, b)),
)
loss("value_and_grad", lambda a: jax.value_and_grad(lambda a: jnp.sum(jnp.cos(a)))(a), slow=True)
loss(
    "a step of gradient descent (MAML)",
    lambda a: x(3, 4) @ (a - 0.1 * jax.grad(lambda a: jnp.mean((x(3, 4) @ a) ** 2))(a)),
)
loss("jvp along data", lambda a: jax.jvp(lambda y: jnp.sin(y @ a), (x(3, 4),), (x(3, 4, seed=1),)))
loss(
    "jvp along a weight",
    lambda a, f: jax.jvp(lambda w: jnp.sin(x(3, 4) @ w), (a,), (f.astype(jnp.float32),)),
)
loss("vjp by a weight", lambda a: jax.vjp(lambda w: jnp.sin(x(3, 4) @ w), a)[1](x(3, 6))[0])
loss("linearize", lambda a: jax.linearize(lambda y: jnp.sin(y @ a), x(3, 4))[1](x(3, 4, seed=1)))
loss(
    "linearize by a weight", lambda a: jax.linearize(lambda w: jnp.sin(x(3, 4) @ w), a)[1](x(4, 6))
)
loss("linear_transpose", lambda a: jax.linear_transpose(lambda y: y @ a, x(3, 4))(x(3, 6)))
loss("hessian by the input", lambda q: jax.hessian(lambda y: jnp.sum(jnp.sin(q @ y)))(x(4)))
loss("hessian by a weight", lambda u: jax.hessian(lambda w: jnp.sum(jnp.sin(w) * w[0]))(u))
loss(
    "jacfwd and jacrev",
    lambda q: (
        jax.jacfwd(lambda y: jnp.sin(q @ y))(x(4)),
        jax.jacrev(lambda y: jnp.sin(q @ y))(x(4)),
    ),
)
loss(
    "laplacian of a network (PINN)",
    lambda a, b: jax.vmap(
        lambda point: jnp.trace(jax.hessian(lambda y: jnp.sum(net(y, a, b)))(point))
    )(x(3, 4)),
    rtol=2e-4,
)
loss(
    "hessian-vector product",
    lambda a: jax.jvp(jax.grad(lambda y: jnp.sum(jnp.sin(y @ a))), (x(3, 4),), (x(3, 4, seed=1),))[
        1
    ],
)
loss(
    "gradient penalty",
    lambda a, b: jnp.mean(
        jnp.linalg.norm(jax.vmap(jax.grad(lambda y: jnp.sum(net(y, a, b))))(x(3, 4)), axis=-1) ** 2
    ),
    slow=True,
)
loss(
    "gradient through a scan",
    lambda q: jax.grad(
        lambda y: jnp.sum(lax.scan(lambda c, _: (jnp.tanh(c @ q), None), y, None, length=3)[0])
    )(x(3, 4)),
)
loss(
    "gradient by a stack through a scan",
    lambda s: jax.grad(
        lambda w: jnp.sum(lax.scan(lambda c, layer: (jnp.tanh(c @ layer), None), x(3, 4), w)[0])
    )(s),
)
loss(
    "closure_convert",
    lambda a: jax.closure_convert(lambda y: y @ a, x(3, 4))[0](
        x(3, 4), *jax.closure_convert(lambda y: y @ a, x(3, 4))[1]
    ),
)

# Checkpoints, names
loss("checkpoint", lambda a, b: jax.checkpoint(net)(x(3, 4), a, b), fused=True)
for policy in ["everything_saveable", "nothing_saveable", "dots_saveable"]:
    loss(
        f"checkpoint, {policy}, differentiated",
        lambda a, b, policy=policy: jax.grad(
            lambda y: jnp.sum(
                jax.checkpoint(net, policy=getattr(jax.checkpoint_policies, policy))(y, a, b)
            )
        )(x(3, 4)),
        slow=policy == "everything_saveable",
    )
loss(
    "checkpoint by name",
    lambda a: jax.grad(
        lambda y: jnp.sum(
            jax.checkpoint(
                lambda y: jnp.sin(checkpoint_name(y @ a, "out")),
                policy=jax.checkpoint_policies.save_only_these_names("out"),
            )(y)
        )
    )(x(3, 4)),
)
loss("checkpoint_name of a weight", lambda a: x(3, 4) @ checkpoint_name(a, "w"))
loss(
    "checkpoint with static arguments",
    lambda a: jax.checkpoint(lambda n, a: x(3, 4) @ a * n, static_argnums=0)(2, a),
    fused=True,
)
loss(
    "checkpoint of a scan",
    lambda s: jax.checkpoint(
        lambda s: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x(3, 4), s)[0]
    )(s),
    fused=True,
)
loss("checkpoint that returns a weight", lambda a: x(3, 4) @ jax.checkpoint(lambda w: w)(a))


@loss("named_call and named_scope", fused=True)
def _(a):
    with jax.named_scope("outer"):
        return jax.named_call(lambda y: y @ a, name="inner")(x(3, 4))


# Inner jits
loss("jit inside", lambda a: jax.jit(lambda a: x(3, 4) @ a)(a), fused=True)
loss(
    "jit with static arguments",
    lambda a: jax.jit(
        lambda a, n, how: how(x(3, 4) @ a) * n, static_argnums=1, static_argnames="how"
    )(a, 2, how=jnp.sin),
    fused=True,
)
loss(
    "jit with a donated weight",
    lambda a: jax.jit(lambda a: jnp.sum(x(3, 4) @ a), donate_argnums=())(a),
    slow=True,
)
loss("jit with a donated copy", lambda a: jax.jit(lambda w: w @ x(6, 6), donate_argnums=0)(a + 1.0))
loss(
    "jit, unused arguments kept",
    lambda a, b: jax.jit(lambda a, b: x(3, 4) @ a, keep_unused=True)(a, b),
    fused=True,
)
loss(
    "jit in jit", lambda a: jax.jit(lambda a: jax.jit(lambda a: x(3, 4) @ a)(a) * 2)(a), fused=True
)
loss("jit, inlined", lambda a: jax.jit(lambda a: x(3, 4) @ a, inline=True)(a), fused=True)
loss("jit that returns its weight", lambda a: x(3, 4) @ jax.jit(lambda a: a)(a))
loss("jit that returns a transpose", lambda a: x(3, 6) @ jax.jit(lambda a: a.T)(a))
loss(
    "jit that swaps two weights",
    lambda q, s: (lambda w, v: x(3, 4) @ w @ v)(*jax.jit(lambda v, w: (w, v))(q, s[1])),
)


@loss("jit called several times", fused=True)
def _(a, b):
    step = jax.jit(lambda y, w: jnp.tanh(y @ w))
    return step(step(step(step(x(3, 4), a), b), a), b)


@loss("jit of a tree", fused=True)
def _(a, b):
    return jax.jit(lambda tree: jnp.tanh(x(3, 4) @ tree["a"]) @ tree["b"][0])({"a": a, "b": [b]})


@loss("eval_shape inside", fused=True)
def _(a):
    shape = jax.eval_shape(lambda a: x(3, 4) @ a, a)
    return x(3, 4) @ a + jnp.ones(shape.shape, shape.dtype)


loss("make_jaxpr inside", lambda a: x(3, 4) @ a * len(jax.make_jaxpr(jnp.sin)(a).eqns))
loss(
    "eval_jaxpr inside",
    lambda a: jax.core.eval_jaxpr((lambda closed: closed.jaxpr)(jax.make_jaxpr(jnp.sin)(a)), (), a),
    slow=True,
)
loss("optimization_barrier", lambda a: x(3, 4) @ lax.optimization_barrier(a))
loss("reduce_precision", lambda a: lax.reduce_precision(a, 8, 4))
loss("composite", lambda a: lax.composite(lambda w: jnp.sin(w), "my.sin")(a), slow=True)


# The world outside
def shape_of(y):
    return jax.ShapeDtypeStruct(y.shape, y.dtype)


loss(
    "odeint with weights as arguments",
    lambda q: odeint(lambda y, t, w: jnp.tanh(w @ y), x(4), jnp.linspace(0.0, 1.0, 3), q),
    rtol=1e-3,
)
loss(
    "odeint with weights closed over",
    lambda q: odeint(lambda y, t: jnp.tanh(q @ y), x(4), jnp.linspace(0.0, 1.0, 3)),
    rtol=1e-3,
    slow=True,
)
loss(
    "pure_callback of a product",
    lambda a: jax.pure_callback(
        lambda y: np.sin(y),
        jax.ShapeDtypeStruct((3, 6), jnp.float32),
        x(3, 4) @ a,
        vmap_method="sequential",
    ),
)
loss(
    "pure_callback of a weight",
    lambda a: jax.pure_callback(lambda w: np.sin(w), shape_of(a), a, vmap_method="expand_dims"),
)
loss(
    "io_callback",
    lambda a: io_callback(
        lambda y: np.asarray(y) * 2, jax.ShapeDtypeStruct((3, 6), jnp.float32), x(3, 4) @ a
    ),
)


@loss("debug.print and debug.callback")
def _(a):
    jax.debug.print("norm {norm} {w}", norm=jnp.linalg.norm(a), w=a)
    jax.debug.callback(lambda w: None, a)
    return x(3, 4) @ a


@loss("checkify")
def _(a):
    def checked(a):
        out = x(3, 4) @ a
        checkify.check(jnp.all(jnp.isfinite(out)), "not finite")
        checkify.check(jnp.all(a < 1e3), "large")
        return out

    return checkify.checkify(checked)(a)[1]


loss(
    "checkify, float checks",
    lambda a: checkify.checkify(lambda a: jnp.log(a**2 + 1.0), errors=checkify.float_checks)(a)[1],
    slow=True,
)
