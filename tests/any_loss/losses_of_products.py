"""Products, contractions and convolutions in every layout."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from loss_table import kind, x

loss = kind("products")


def dot(left, right, contracting, batch=((), ()), **more):
    return lax.dot_general(left, right, (contracting, batch), **more)


loss("data by weight", lambda a: x(3, 4) @ a, fused=True)
loss("weight by data", lambda a: a @ x(6, 3), fused=True)
loss("mean square of a linear layer", lambda a, v: jnp.mean((x(3, 4) @ a + v - 1.0) ** 2))
loss("vector by weight", lambda a: x(4) @ a, fused=True)
loss("weight by vector", lambda a: a @ x(6), fused=True)
loss("broadcast over leading axes", lambda a: x(2, 3, 4) @ a, fused=True)
loss("data by a stack", lambda s: x(5, 4) @ s, fused=True)
loss("a stack by data", lambda s: s @ x(4, 5), fused=True)
loss("batched by a stack", lambda s: jnp.matmul(x(3, 5, 4), s), fused=True)
loss("matmul broadcasts the weight", lambda q: jnp.matmul(x(2, 3, 5, 4), q[None, None]))
loss("two layers", lambda a, b: jnp.tanh(x(3, 4) @ a) @ b, fused=True)
loss("weight by weight", lambda a, b: a @ b)
loss("weight by weight by data", lambda a, b: (b @ a) @ x(6, 2))
loss("weight by its transpose", lambda a: a @ a.T)
loss("gram matrix", lambda a: a.T @ a)
loss("orthogonality penalty", lambda a: jnp.sum((a @ a.T - jnp.eye(4)) ** 2))
loss("quadratic form", lambda q: x(4) @ q @ x(4, seed=1), fused=True)
loss("quadratic forms, batched", lambda q: jnp.einsum("bi,ij,bj->b", x(5, 4), q, x(5, 4)))
loss("matrix power", lambda q: jnp.linalg.matrix_power(q, 3))
loss("multi_dot", lambda a, b: jnp.linalg.multi_dot([x(2, 4), a, b, x(4, 3)]))
loss("tied weights", lambda a: jnp.tanh(x(3, 4) @ a) @ a.T, fused=True)
loss("transposed before", lambda a: x(3, 6) @ a.T, fused=True)
loss("transposed twice", lambda a: x(3, 4) @ a.T.T, fused=True)
loss("transposed and reshaped", lambda s: x(2, 12) @ s.transpose(1, 0, 2).reshape(12, 4))

for i, (contracting, batch) in enumerate(
    [
        (((0,), (0,)), ((), ())),
        (((1,), (2,)), ((), ())),
        (((0, 1), (0, 1)), ((), ())),
        (((0, 2), (0, 2)), ((), ())),
        (((2, 1), (2, 1)), ((), ())),
        (((0, 1, 2), (0, 1, 2)), ((), ())),
        (((1,), (1,)), ((0,), (0,))),
        (((2,), (1,)), ((0,), (0,))),
        (((1,), (1,)), ((0, 2), (0, 2))),
        (((0,), (0,)), ((2, 1), (2, 1))),
        (((), ()), ((0,), (0,))),
        (((), ()), ((2,), (2,))),
        (((), ()), ((), ())),
    ]
):
    rest = i > 8
    loss(
        f"dot_general {contracting} {batch}, weight right",
        lambda s, c=contracting, b=batch: dot(x(3, 4, 4), s, c, b),
        fused=True,
        slow=rest,
    )
    loss(
        f"dot_general {contracting} {batch}, weight left",
        lambda s, c=contracting, b=batch: dot(s, x(3, 4, 4), c[::-1], b[::-1]),
        fused=True,
        slow=rest or i % 2 == 0,
    )

for string, *shapes in [
    ("bi,io->bo", (3, 4)),
    ("ib,io->ob", (4, 3)),
    ("bti,io->tbo", (2, 3, 4)),
    ("i,io->o", (4,)),
    ("bo,io->bi", (3, 6)),
    ("bio,io->b", (3, 4, 6)),
    ("io,io->", (4, 6)),
    ("io,io->i", (4, 6)),
    ("bi,io->", (3, 4)),
    ("b,io->bio", (3,)),
    ("...i,io->...o", (2, 3, 4)),
    ("bi,io,oc->bc", (3, 4), (6, 2)),
]:
    loss(
        f"einsum {string}",
        lambda a, string=string, shapes=shapes: jnp.einsum(
            string, x(*shapes[0]), a, *(x(*shape) for shape in shapes[1:])
        ),
    )
for string in ["ii->", "ii->i", "ij->ji", "ij->", "ij->j"]:
    loss(f"einsum of one weight {string}", lambda q, string=string: jnp.einsum(string, q))
loss("einsum nii,bn->bi", lambda s: jnp.einsum("nii,bn->bi", s, x(2, 3)))
loss("einsum of a weight with itself ij,ij->", lambda a: jnp.einsum("ij,ij->", a, a))
loss("einsum of a weight with itself ij,kj->ik", lambda a: jnp.einsum("ij,kj->ik", a, a))
loss("einsum of two weights, ij,jk->ik", lambda a, b: jnp.einsum("ij,jk->ik", a, b))
loss("einsum of three, ij,bj,jk->bik", lambda a, b: jnp.einsum("ij,bj,jk->bik", a, x(2, 6), b))
loss(
    "einsum with a path",
    lambda a, b: jnp.einsum("bi,ij,jk->bk", x(2, 4), a, b, optimize=[(0, 1), (0, 1)]),
)
loss("tensordot of two axes", lambda s: jnp.tensordot(x(4, 4, 2), s, ((0, 1), (1, 2))))
loss("tensordot, axes=1", lambda a: jnp.tensordot(a, x(6, 2), axes=1), fused=True)
loss("tensordot, axes=0", lambda v: jnp.tensordot(v, x(2), axes=0))
loss("vdot", lambda a: jnp.vdot(a, x(4, 6)))
loss("vecdot", lambda a: jnp.vecdot(x(4, 6), a))
loss("inner", lambda a: jnp.inner(x(3, 6), a), fused=True)
loss("outer of weights", lambda v, u: jnp.outer(v, u))
loss("kron", lambda a: jnp.kron(a, x(2, 2)))
loss("cross", lambda a: jnp.cross(a.reshape(8, 3), x(8, 3)))
loss("matvec and vecmat", lambda a: (jnp.matvec(a, x(6)), jnp.vecmat(x(4), a)), fused=True)
loss("weight by scalar weight", lambda a, t: x(3, 4) @ (a * t))
loss("weight with a fixed mask", lambda a: x(3, 4) @ (a * (x(4, 6) > 0)))
loss("khatri-rao", lambda a: (a[:, None] * x(1, 3, 6)).reshape(12, 6))

# Dtypes
loss(
    "float32 out of bfloat16",
    lambda h: jnp.matmul(x(3, 4, dtype=jnp.bfloat16), h, preferred_element_type=jnp.float32),
    fused=True,
    rtol=2e-2,
)
loss("bfloat16 product", lambda h: x(3, 4, dtype=jnp.bfloat16) @ h, fused=True, rtol=5e-2)
loss("float16 product", lambda f: x(3, 4, dtype=jnp.float16) @ f, fused=True, rtol=1e-2)
loss("float32 data by bfloat16 weight", lambda h: x(3, 4) @ h)
loss("bfloat16 data by float32 weight", lambda a: x(3, 4, dtype=jnp.bfloat16) @ a, rtol=1e-3)
loss(
    "weight cast to bfloat16",
    lambda a: x(3, 4, dtype=jnp.bfloat16) @ a.astype(jnp.bfloat16),
    fused=True,
    rtol=5e-2,
)
loss("bfloat16 by float16 weights", lambda h, f: h @ f.T.astype(jnp.bfloat16), rtol=0.1)
loss("integers by weight", lambda a: jnp.arange(12).reshape(3, 4) @ a)
loss("int8 by weight", lambda a: jnp.arange(12, dtype=jnp.int8).reshape(3, 4).astype(a.dtype) @ a)
loss("booleans by weight", lambda a: (x(3, 4) > 0) @ a)
loss("complex data by weight", lambda a: (x(3, 4) + 1j * x(3, 4, seed=1)) @ a)
loss("precision highest", lambda a: jnp.dot(x(3, 4), a, precision=lax.Precision.HIGHEST))
loss("precision by name", lambda a: jnp.matmul(x(3, 4), a, precision="float32"), slow=True)
loss(
    "a pair of precisions",
    lambda a: jnp.matmul(x(3, 4), a, precision=("default", "highest")),
    slow=True,
)


@loss("default matmul precision", slow=True)
def _(a):
    with jax.default_matmul_precision("bfloat16"):
        return x(3, 4) @ a


@loss("dynamic int8 quantization of the weight")
def _(a):
    scale = jnp.max(jnp.abs(a), axis=0) / 127.0
    codes = jnp.round(a / scale).astype(jnp.int8)
    data = jnp.round(x(3, 4) * 40).astype(jnp.int8)
    return lax.dot(data, codes, preferred_element_type=jnp.int32) * scale


if jax.default_backend() == "gpu":  # nowhere else

    @loss("scaled_matmul", slow=True)
    def _(q):
        ones = jnp.ones((1, 4, 1), jnp.bfloat16)
        data = x(1, 4, 4, dtype=jnp.bfloat16)
        return jax.nn.scaled_matmul(data, q[None].astype(jnp.bfloat16), ones, ones)


# Ragged
SIZES = np.array([2, 0, 3], np.int32)
loss("ragged_dot, weight right", lambda s: lax.ragged_dot(x(5, 4), s, jnp.asarray(SIZES)))
loss("ragged_dot, weight left", lambda e: lax.ragged_dot(e, x(3, 5, 2), jnp.array([2, 1, 4])))
loss("ragged_dot, both", lambda q, s: lax.ragged_dot(q, s, jnp.array([1, 1, 2])))
loss(
    "ragged_dot in bfloat16, out in float32",
    lambda s: lax.ragged_dot(
        x(5, 4, dtype=jnp.bfloat16),
        s.astype(jnp.bfloat16),
        jnp.asarray(SIZES),
        preferred_element_type=jnp.float32,
    ),
    rtol=5e-2,
)


@loss("ragged_dot_general over the contracted axis")
def _(e):
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(e, x(7, 3), jnp.array([3, 4]), dims)


@loss("a mixture of experts by look-up", slow=True)
def _(s):
    chosen = jnp.array([2, 0, 1, 1, 0])
    return jnp.einsum("bi,bio->bo", x(5, 4), s[chosen])


@loss("a mixture of experts, all of them weighted")
def _(s, q):
    gates = jax.nn.softmax(x(5, 4) @ q[:, :3])
    return jnp.einsum("bi,nio,bn->bo", x(5, 4), s, gates)


# Convolutions
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(data, kernel, strides=(1, 1), padding="SAME", numbers=NHWC, **more):
    return lax.conv_general_dilated(
        data, kernel, strides, padding, dimension_numbers=numbers, **more
    )


loss("conv 2d", lambda k: conv(x(2, 5, 5, 2), k), fused=True)
loss("conv 2d, strided", lambda k: conv(x(2, 5, 5, 2), k, (2, 2), "VALID"), fused=True)
loss("conv 2d, dilated", lambda k: conv(x(1, 6, 6, 2), k, rhs_dilation=(2, 2)), fused=True)
loss(
    "conv 2d, data dilated",
    lambda k: conv(x(1, 3, 3, 2), k, padding=((1, 1), (1, 2)), lhs_dilation=(2, 2)),
    slow=True,
)
loss("conv 2d, grouped", lambda k: conv(x(1, 4, 4, 4), k, feature_group_count=2), fused=True)
loss("conv 2d, batch groups", lambda k: conv(x(2, 4, 4, 2), k, batch_group_count=2), slow=True)
loss(
    "conv 2d, depthwise",
    lambda k: conv(x(1, 4, 4, 8), k.reshape(3, 3, 1, 8), feature_group_count=8),
)
loss(
    "conv 2d as NCHW, OIHW",
    lambda k: conv(x(1, 2, 4, 4), k.transpose(3, 2, 0, 1), numbers=("NCHW", "OIHW", "NCHW")),
)
loss("conv 1d", lambda s: conv(x(2, 6, 4), s, (1,), "SAME", ("NWC", "WIO", "NWC")), fused=True)
loss(
    "conv 3d",
    lambda r: conv(
        x(1, 3, 3, 3, 4),
        r[..., None, :].reshape(2, 3, 1, 4, 4),
        (1, 1, 1),
        "SAME",
        ("NDHWC", "DHWIO", "NDHWC"),
    ),
)
loss("conv transposed", lambda k: lax.conv_transpose(x(1, 3, 3, 2), k, (2, 2), "SAME"))
loss(
    "conv transposed, kernel transposed",
    lambda k: lax.conv_transpose(x(1, 3, 3, 4), k, (2, 2), "SAME", transpose_kernel=True),
    slow=True,
)
loss("conv, the weight is the data", lambda k: conv(k, x(2, 2, 4, 3)))
loss("conv, weights are both", lambda k, r: conv(r, k[:2, :2].reshape(2, 2, 4, 2)[:, :, :4]))
loss(
    "conv in bfloat16",
    lambda k: conv(x(1, 4, 4, 2, dtype=jnp.bfloat16), k.astype(jnp.bfloat16)),
    rtol=5e-2,
)
loss(
    "conv patches",
    lambda k: jnp.einsum(
        "bhwf,fo->bhwo",
        lax.conv_general_dilated_patches(
            x(1, 4, 4, 2), (3, 3), (1, 1), "SAME", dimension_numbers=NHWC
        ),
        k.transpose(2, 0, 1, 3).reshape(18, 4),
    ),
)
loss("separable conv", lambda k, q: conv(conv(x(1, 4, 4, 2), k), q[None, None]), slow=True)

# Attention
loss(
    "dot_product_attention",
    lambda s: jax.nn.dot_product_attention(x(1, 3, 4, 4), s[None], x(1, 3, 4, 4, seed=1)),
)
loss(
    "attention, keys and values are weights",
    lambda s: jax.nn.dot_product_attention(x(3, 4, 4), s, s, is_causal=True),
    slow=True,
)


@loss("self-attention with fused projections", fused=True)
def _(g, b):
    q, k, v, gate = jnp.split(x(5, 6) @ g, 4, axis=-1)
    mixed = jax.nn.softmax(q @ k.T / jnp.sqrt(6.0)) @ v
    return (mixed * jax.nn.sigmoid(gate)) @ b


@loss("grouped-query attention from einsums")
def _(r):
    q = jnp.einsum("td,ghdk->tghk", x(5, 4), r)
    k = jnp.einsum("td,gdk->tgk", x(5, 4), r[:, 0])
    weights = jax.nn.softmax(jnp.einsum("tghk,sgk->ghts", q, k))
    return jnp.einsum("ghts,sgk->tghk", weights, k)


@loss("attention with learned sinks and biases")
def _(q, a):
    logits = x(4, 6) @ a.T + q
    return jax.nn.softmax(jnp.concatenate([logits, q[:, :1]], axis=-1))[:, :-1] @ x(4, 6)
