"""Attacks on images of any shape: every pixel can be changed, and no small image is asked in vain.

Square Attack's own code draws a corner below n - side and so never reaches the last row and column.

Reported of kindred projects: fra31/auto-attack 81, Trusted-AI/adversarial-robustness-toolbox 1244
(images that are not square).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns

from experiments.attack.attack import attack
from experiments.attack.config import Config
from experiments.attack.methods import coarse_to_fine, corners, square

SHAPES = [(1, 1, 1), (1, 5, 1), (6, 1, 1), (3, 7, 2), (4, 4, 31)]
CONFIGS = {
    "square": Config(method="square", budget=60, batch_size=2),
    "coarse to fine": Config(method="zoqo", structure="coarse_to_fine", budget=60, batch_size=2),
    "sign hunter": Config(method="sign_hunter", budget=60, batch_size=2),
}


def never_fooled(images):
    """Logits of a network whose first class is never left, but for which every pixel counts."""
    score = images.reshape(len(images), -1).sum(axis=1)
    return jnp.stack([score + 1e6, score], axis=1)


@pytest.mark.parametrize(("name", "shape"), by_turns(CONFIGS, SHAPES), ids=str)
def test_images_of_any_shape_are_attacked(name, shape):
    images, labels = np.full((2, *shape), 0.5, np.float32), np.zeros(2, int)
    outcome = attack(never_fooled, images, labels, CONFIGS[name])
    assert not outcome.success.any() and outcome.perturbation.shape == images.shape
    assert (outcome.queries >= 1).all() and (outcome.queries <= 60).all()


@pytest.mark.parametrize(
    ("side", "shape"),
    by_turns([1, 2, 4], [(1, 9, 1), (9, 1, 3), (5, 6, 1), (8, 8, 31), (12, 7, 70)]),
    ids=str,
)
def test_squares_reach_every_pixel_and_always_change_something(side, shape):
    signs = jnp.ones(shape, jnp.int8)
    draw = jax.jit(jax.vmap(lambda key: square.changed(signs, key, jnp.int32(side)) != signs))
    changes = np.asarray(draw(jax.random.split(jax.random.key(0), 1000)))
    assert changes.any(axis=(1, 2, 3)).all()
    assert changes.any(axis=(0, 3)).all()


@pytest.mark.parametrize("shape", [(1, 7, 1), (7, 1, 1), (5, 3, 1), (28, 28, 1)], ids=str)
def test_the_blocks_of_all_rounds_reach_every_pixel(shape):
    steps = jnp.arange(coarse_to_fine.count_of_blocks(shape))
    block = jax.vmap(lambda step: coarse_to_fine.blocks(step, jax.random.key(0), shape))
    flips = jax.jit(block)(steps)
    singles = np.asarray(flips)[np.asarray(flips).sum(axis=(1, 2)) == 1]
    assert singles.any(axis=0).all()


@pytest.mark.parametrize(
    ("name", "shape"),
    by_turns(["square", "coarse to fine"], [(1, 1, 1), (1, 3, 1), (2, 2, 1)]),
    ids=str,
)
def test_no_corner_of_a_small_image_is_asked_about_twice(name, shape):
    seen = []

    def model(images):
        seen.extend(np.asarray(images).reshape(len(images), -1).tolist())
        return np.stack([np.full(len(images), 1.0), np.zeros(len(images))], axis=1)

    outcome = attack(
        model,
        np.full((1, *shape), 0.5, np.float32),
        np.zeros(1, int),
        CONFIGS[name],
        compiled=False,
    )
    corner_count = 2 ** int(np.prod(shape))
    assert outcome.queries[0] == min(corner_count, 60)
    asked = {tuple(np.round(x, 5)) for x in seen}
    assert len(asked) >= corner_count


def test_a_corner_that_was_tried_gives_way_to_the_nearest_other():
    tried = corners.none_tried((1, 2, 1), 100)
    signs = jnp.array([[[1], [1]]], jnp.int8)
    tried = corners.with_one(tried, signs)
    other = corners.untried(tried, signs, signs)
    assert int((other != signs).sum()) == 1
    for _ in range(3):
        tried = corners.with_one(tried, corners.untried(tried, signs, signs))
    assert bool(corners.all_tried(tried))
