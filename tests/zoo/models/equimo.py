"""equimo's vision models, in Equinox."""

import jax

from zoo.data import cross_entropy, labels, normal
from zoo.registry import model

_PACKAGE = "equimo"


def _vision(net, size=16):
    x, y, keys = normal(2, 3, size, size), labels(2), jax.random.split(jax.random.key(1), 2)
    return net, lambda net: cross_entropy(jax.vmap(net)(x, keys), y)


@model("equimo VisionTransformer", _PACKAGE, slow=True)
def vit():
    import equimo.models as em

    net = em.VisionTransformer(
        img_size=16, in_channels=3, dim=16, patch_size=8, num_heads=[2], depths=[1],
        num_classes=4, key=jax.random.PRNGKey(0),
    )  # fmt: skip
    return _vision(net)


@model("equimo ConvNeXt", _PACKAGE, bits=8, slow=True)
def convnext():
    import equimo.models as em

    net = em.ConvNeXt(
        3, depths=[1, 1], dims=[8, 16], num_classes=4, layer_scale_init_value=1.0,
        key=jax.random.PRNGKey(0),
    )  # fmt: skip
    return _vision(net, 32)


@model("equimo MLLA (linear attention)", _PACKAGE, slow=True)
def mlla():
    import equimo.models as em

    net = em.Mlla(
        16, 3, dim=16, patch_size=4, depths=[1], num_heads=[2], num_classes=4,
        key=jax.random.PRNGKey(0),
    )  # fmt: skip
    return _vision(net)
