"""Elementwise operations, dtypes, reductions, linear algebra, Fourier transforms, randomness."""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from loss_table import kind, x

loss = kind("elementwise")

UNARY = [
    "negative",
    "abs",
    "sign",
    "round",
    "floor",
    "ceil",
    "exp",
    "expm1",
    "sin",
    "tan",
    "arctan",
    "tanh",
    "sinh",
    "square",
    "cbrt",
    "isfinite",
    "signbit",
    "reciprocal",
    "nan_to_num",
    "positive",
    "real",
    "imag",
    "conj",
    "exp2",
    "sinc",
    "i0",
    "rint",
    "trunc",
    "logical_not",
]
ROUND = (
    "sign",
    "round",
    "floor",
    "ceil",
    "isfinite",
    "signbit",
    "imag",
    "rint",
    "trunc",
    "logical_not",
)
USUAL = ("negative", "abs", "sign", "floor", "exp", "tanh", "square", "isfinite", "real", "imag")
for name in UNARY:
    loss(
        name,
        lambda a, name=name: getattr(jnp, name)(a),
        flat=name in ROUND,
        slow=name not in USUAL,
        rtol=2e-4,
    )
for name in ["log", "sqrt", "log1p", "log2", "arccosh"]:
    loss(
        f"{name} of a positive weight",
        lambda a, name=name: getattr(jnp, name)(a**2 + 1.1),
        slow=name != "log",
    )
for name in [
    "relu",
    "gelu",
    "silu",
    "softplus",
    "softmax",
    "log_softmax",
    "sigmoid",
    "logsumexp",
    "standardize",
    "elu",
    "relu6",
    "leaky_relu",
    "glu",
    "hard_tanh",
    "squareplus",
]:
    loss(
        f"{name} of a weight",
        lambda a, name=name: getattr(jax.nn, name)(a),
        slow=name not in ("gelu", "softmax", "logsumexp", "glu"),
        rtol=2e-4,
    )
for name in ["erf", "gammaln", "ndtr", "expit", "digamma"]:
    loss(
        f"{name} of a weight",
        lambda a, name=name: getattr(jax.scipy.special, name)(a),
        rtol=2e-3,
        slow=name != "erf",
    )
for name in [
    "add",
    "subtract",
    "multiply",
    "divide",
    "maximum",
    "minimum",
    "power",
    "arctan2",
    "hypot",
    "copysign",
    "nextafter",
    "fmod",
    "remainder",
    "logaddexp",
    "greater",
    "equal",
    "floor_divide",
    "heaviside",
    "ldexp",
]:

    def binary(a, f, name=name):
        fn = getattr(jnp, name)
        f = f.astype(jnp.float32) + 3.3 if name in ("power", "divide") else f.astype(jnp.float32)
        if name == "ldexp":
            return fn(a, jnp.arange(6))
        a = jnp.abs(a) if name == "power" else a
        return fn(a, f), fn(a, 1.5), fn(0.5, f)

    loss(
        f"{name} of weights",
        binary,
        rtol=5e-3 if name == "power" else 2e-4,
        flat=name in ("greater", "equal", "floor_divide", "heaviside"),
        slow=name not in ("add", "multiply", "maximum", "copysign", "greater"),
    )

for name in ["float32", "bfloat16", "float16", "int32", "int8", "bool", "complex64"]:
    loss(
        f"astype {name}",
        lambda a, name=name: (3 * a).astype(name),
        rtol=2e-2,
        flat=name in ("int32", "int8", "bool"),
    )
    loss(
        f"bfloat16 weight astype {name}",
        lambda h, name=name: h.astype(name),
        rtol=2e-2,
        flat=name in ("int32", "int8", "bool"),
        slow=name != "float32",
    )
loss("astype down and up", lambda a: a.astype(jnp.bfloat16).astype(jnp.float32))
loss("astype down, transposed, up", lambda a: a.astype(jnp.float16).T.astype(jnp.float32))
loss("bitcast", lambda a: lax.bitcast_convert_type(a, jnp.int32) & 0xFF, flat=True)
loss("bitcast to bytes", lambda a: lax.bitcast_convert_type(a, jnp.uint8), flat=True, slow=True)
loss("view", lambda a: a.view(jnp.int32) >> 20, flat=True, slow=True)
loss("frexp", lambda a: jnp.frexp(a), slow=True)
loss("complex of two weights", lambda a, b: jnp.exp(lax.complex(a, b.T)))
loss("complex matrix of two weights", lambda q, s: x(3, 4) @ (q + 1j * s[0]))
loss("unit complex numbers", lambda a: jnp.exp(1j * a))
loss("clip", lambda a: jnp.clip(a, -0.5, 0.5))
loss("clip by weights", lambda a, t: jnp.clip(a, -jnp.abs(t), jnp.abs(t)))
loss("scaled and shifted", lambda a, t: 2.0 * a + t - 1)
loss(
    "in-place operators",
    lambda a: (lambda w: w.__imul__(2.0) if hasattr(w, "__imul__") else w * 2)(a),
    slow=True,
)
loss(
    "methods of arrays",
    lambda a: (a.sum(), a.mean(0), a.T, a.min(), a.round(1), a.clip(0), a.size, a.ndim, a.shape[0]),
)
loss("weight norm", lambda a, v: x(3, 4) @ (v * a / jnp.linalg.norm(a, axis=0)))
loss(
    "spectral norm",
    lambda a: (
        x(3, 4)
        @ (
            a
            / lax.fori_loop(
                0, 3, lambda i, s: jnp.linalg.norm(a @ (a.T @ s)) * jnp.ones(4) / 2, jnp.ones(4)
            )[0]
        )
    ),
    rtol=2e-4,
)
loss("LoRA, summed", lambda a, b, q: x(3, 4) @ (q + 0.5 * a @ b))
loss("LoRA, beside", lambda a, b, q: x(3, 4) @ q + 0.5 * (x(3, 4) @ a) @ b, fused=True)
loss("gating", lambda a, f: jnp.tanh(x(3, 4) @ a) * jax.nn.sigmoid(x(3, 4) @ f.astype(jnp.float32)))
loss("gated by a weight", lambda a, v: (x(3, 4) @ a) * jax.nn.sigmoid(v))
loss(
    "layer norm",
    lambda a, v: (
        lambda y: (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5) * v
    )(x(3, 4) @ a),
    rtol=2e-4,
)
loss("RMS norm", lambda v: v * x(3, 6) * lax.rsqrt(jnp.mean(x(3, 6) ** 2, -1, keepdims=True)))
loss(
    "batch norm with weights as statistics",
    lambda v, a: (x(3, 6) - v) / jnp.sqrt(a[0] ** 2 + 0.1),
    rtol=2e-4,
)
loss("EMA of weights", lambda a: 0.9 * a + 0.1 * x(4, 6))
loss("a mean of weights", lambda q, s: x(3, 4) @ jnp.mean(jnp.stack([q, *s]), axis=0))
loss("model soup", lambda s, u: x(3, 4) @ jnp.einsum("n,nij->ij", jax.nn.softmax(u[:3]), s))
loss("hypernetwork", lambda b: x(3, 4) @ (x(6) @ b).reshape(4, 1))
loss(
    "cross entropy",
    lambda a: optax.softmax_cross_entropy_with_integer_labels(
        x(3, 4) @ a, jnp.array([0, 5, 2])
    ).mean(),
)
loss(
    "contrastive",
    lambda a: jnp.mean(optax.losses.ntxent(x(4, 4) @ a, jnp.array([0, 0, 1, 1]))),
    rtol=2e-4,
    slow=True,
)
loss("cosine similarity with a weight", lambda a: optax.losses.cosine_similarity(x(4, 6), a))
loss("a constant", lambda a: jnp.float32(3.0), flat=True)
loss("a weight alone", lambda t: t)
loss("comparison with a constant", lambda a: jnp.mean(a > 0.0), flat=True)
loss("numpy scalars", lambda a: a * __import__("numpy").float32(2.0))
loss("weight by Python integer", lambda a: 2 * a - 1)

loss = kind("reductions")
for name in [
    "sum",
    "mean",
    "max",
    "min",
    "prod",
    "var",
    "std",
    "median",
    "any",
    "all",
    "argmax",
    "argmin",
    "ptp",
    "cumsum",
    "cumprod",
    "count_nonzero",
    "nansum",
    "nanmean",
]:
    for axis in [None, 0, -1, (0, 1)]:
        one_axis = name.startswith(("arg", "cum"))
        if one_axis and isinstance(axis, tuple):
            continue
        loss(
            f"{name} over {axis}",
            lambda a, name=name, axis=axis: getattr(jnp, name)(a, axis=axis),
            flat=name in ("any", "all", "argmax", "argmin", "count_nonzero"),
            slow=axis not in (0, -1)
            or name not in ("sum", "max", "prod", "argmax", "cumsum", "var"),
            rtol=2e-4,
        )
loss("sum of a stack over its middle", lambda s: s.sum(1))
loss("sum, where", lambda a: jnp.sum(a, where=x(4, 6) > 0, initial=1.0), slow=True)
loss("cummax, reversed", lambda a: lax.cummax(a, axis=1, reverse=True))
loss("cumlogsumexp", lambda a: lax.cumlogsumexp(a, axis=0), slow=True)
loss("percentile", lambda a: jnp.percentile(a, 30.0, axis=0))
loss("quantile, lower", lambda v: jnp.quantile(v, 0.6, method="lower"), slow=True)
loss("histogram", lambda a: jnp.histogram(a, bins=4, range=(-2.0, 2.0))[0], flat=True)
loss("average, weighted", lambda a, u: jnp.average(a, axis=0, weights=u**2 + 0.1), rtol=2e-4)
loss("cov and corrcoef", lambda a: (jnp.cov(a), jnp.corrcoef(a)), rtol=2e-4)
loss("lax.reduce with a function", lambda a: lax.reduce(a, 0.0, lambda p, q: p + 2 * q - q, (0,)))
loss("logsumexp of a product", lambda a: jax.nn.logsumexp(x(3, 4) @ a, axis=-1), fused=True)
loss("diff, ediff1d, gradient", lambda v: (jnp.diff(v), jnp.gradient(v)))
loss("trapezoid", lambda v: jnp.trapezoid(v), slow=True)
loss("allclose", lambda a: jnp.allclose(a, x(4, 6)).astype(float), flat=True, slow=True)

loss = kind("linear algebra")


def steady(q):
    """A well-conditioned matrix of a weight."""
    return q + 6.0 * jnp.eye(4)


def definite(q):
    return q @ q.T + 3.0 * jnp.eye(4)


rough = {"rtol": 1e-3}
loss("inv", lambda q: x(3, 4) @ jnp.linalg.inv(steady(q)), **rough)
loss("inv of a weight as it is", lambda s: jnp.linalg.inv(s)[0, 0] * 0.1, rtol=2e-2, slow=True)
loss("solve", lambda q, u: jnp.linalg.solve(steady(q), u), **rough)
loss("solve, weight on the right", lambda q: jnp.linalg.solve(definite(x(4, 4)), q), **rough)
loss("cholesky", lambda q: jnp.linalg.cholesky(definite(q)), **rough)
loss("qr", lambda a: jnp.abs(jnp.linalg.qr(a.T)[1]), **rough)
loss("svd", lambda a: jnp.linalg.svd(a, compute_uv=False), **rough)
loss(
    "low rank by svd",
    lambda a: (lambda u, s, v: x(3, 4) @ (u[:, :2] * s[:2]) @ v[:2])(
        *jnp.linalg.svd(a, full_matrices=False)
    ),
    rtol=1e-2,
)
loss("eigvalsh", lambda q: jnp.linalg.eigvalsh(q + q.T), **rough)
loss("eigh", lambda q: jnp.abs(jnp.linalg.eigh(definite(q))[1]), slow=True, rtol=1e-2)
loss("lu", lambda q: jax.scipy.linalg.lu(steady(q))[2], **rough)
loss("det", lambda q: jnp.linalg.det(q), **rough)
loss("slogdet", lambda s: jnp.linalg.slogdet(s)[1], **rough)
loss("expm", lambda q: jax.scipy.linalg.expm(0.2 * (q - q.T)), **rough)
loss("lstsq", lambda b, v: jnp.linalg.lstsq(b, v)[0], slow=True, rtol=1e-2)
loss("pinv", lambda b: jnp.linalg.pinv(b), slow=True, rtol=1e-2)
for order in [None, "fro", "nuc", 1, 2, -1, jnp.inf]:
    loss(
        f"norm {order}",
        lambda a, order=order: jnp.linalg.norm(a, order),
        slow=order not in (None, "nuc", 1),
        **rough,
    )
for order in [0, 1, 2, 3, jnp.inf]:
    loss(
        f"norm of a vector, {order}",
        lambda v, order=order: jnp.linalg.norm(v, order),
        flat=order == 0,
        slow=order != 3,
    )
loss(
    "triangular_solve",
    lambda q, u: jax.scipy.linalg.solve_triangular(steady(q), u, lower=True),
    **rough,
)
loss(
    "cho_solve",
    lambda q, u: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(definite(q)), u),
    **rough,
)
loss(
    "a Gaussian's log density",
    lambda q, u: jax.scipy.stats.multivariate_normal.logpdf(x(3, 4), u, definite(q)),
    slow=True,
    **rough,
)
loss(
    "cayley transform",
    lambda q: (
        x(3, 4) @ jnp.linalg.solve(jnp.eye(4) + 0.1 * (q - q.T), jnp.eye(4) - 0.1 * (q - q.T))
    ),
    **rough,
)
loss("householder", lambda u: x(3, 4) @ (jnp.eye(4) - 2 * jnp.outer(u, u) / (u @ u)), **rough)
for name in ["fft", "ifft", "rfft", "fft2", "fftn", "ifftn"]:
    loss(
        name, lambda a, name=name: getattr(jnp.fft, name)(a), slow=name in ("fftn", "ifftn", "fft2")
    )
loss("irfft of a product", lambda v: jnp.fft.irfft(jnp.fft.rfft(x(3, 6)) * jnp.fft.rfft(v), n=6))
loss(
    "spectral convolution (FNO)",
    lambda s, r: jnp.fft.irfft(
        jnp.einsum("bki,kio->bko", jnp.fft.rfft(x(2, 4, 4), axis=1), s + 1j * r[0]), axis=1
    ),
    rtol=2e-4,
)
loss("convolve", lambda v: jnp.convolve(x(9), v, mode="same"))
loss("correlate", lambda v: jnp.correlate(v, x(3)))
loss("polyval", lambda v: jnp.polyval(v, x(5)), rtol=2e-4)
loss("interp", lambda v: jnp.interp(x(5), jnp.arange(-3.0, 3.0), v))
loss("toeplitz", lambda v: jax.scipy.linalg.toeplitz(v), slow=True)
loss("circulant product", lambda v: v[(jnp.arange(6)[:, None] - jnp.arange(6)) % 6] @ x(6))
loss("resize of an image", lambda s: jax.image.resize(s, (3, 6, 6), "linear"), slow=True)
loss(
    "map_coordinates",
    lambda q: jax.scipy.ndimage.map_coordinates(
        q, [jnp.array([0.5, 2.2]), jnp.array([1.1, 0.3])], order=1
    ),
)

loss = kind("random")
key = lambda: jax.random.key(7)  # noqa: E731
loss("dropout of activations", lambda a: (x(3, 4) @ a) * jax.random.bernoulli(key(), 0.5, (3, 6)))
loss(
    "dropout of a weight",
    lambda a: x(3, 4) @ jnp.where(jax.random.bernoulli(key(), 0.5, a.shape), a, 0.0),
)
loss("a weight as the mean", lambda v: v + jax.random.normal(key(), (3, 6)))
loss(
    "noise of a weight's size",
    lambda a: x(3, 4) @ (a + 0.1 * jax.random.normal(key(), a.shape, a.dtype)),
)
loss("categorical of weights", lambda a: jax.random.categorical(key(), a), flat=True)
loss("gumbel softmax", lambda a: jax.nn.softmax(a + jax.random.gumbel(key(), a.shape)))
loss("permutation of rows", lambda e: jax.random.permutation(key(), e))
loss("choice of rows", lambda e: jax.random.choice(key(), e, (3,)))
loss("bernoulli of weights", lambda a: jax.random.bernoulli(key(), jax.nn.sigmoid(a)), flat=True)
loss(
    "truncated_normal between weights",
    lambda t: jax.random.truncated_normal(key(), -jnp.abs(t) - 0.1, 1.0, (5,)),
    rtol=1e-3,
)
loss("gamma of weights", lambda v: jax.random.gamma(key(), v**2 + 1.0), slow=True, rtol=1e-2)
loss(
    "multivariate_normal", lambda u: jax.random.multivariate_normal(key(), u, jnp.eye(4)), slow=True
)
loss(
    "variational layer",
    lambda a, f: (
        x(3, 4) @ (a + jax.nn.softplus(f.astype(jnp.float32)) * jax.random.normal(key(), a.shape))
    ),
)
loss(
    "a Monte Carlo mean by vmap",
    lambda v: jax.vmap(lambda k: jnp.tanh(v * jax.random.normal(k, (6,))))(
        jax.random.split(key(), 3)
    ),
)
loss("legacy keys", lambda v: v * jax.random.uniform(jax.random.PRNGKey(0), (6,)), slow=True)
loss(
    "a seed from a weight",
    lambda v: v + jax.random.uniform(jax.random.fold_in(key(), jnp.argmax(v)), (6,)),
)
loss(
    "noise in a scan",
    lambda q: lax.scan(
        lambda c, k: (jnp.tanh(c @ q + jax.random.normal(k, (2, 4))), None),
        x(2, 4),
        jax.random.split(key(), 3),
    )[0],
    fused=True,
)
