"""What claims train on and by: data, models, and rates that mean the same to all methods."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from experiments.attack import models as image_models
from experiments.laboratory.networks import methods, models, tasks, training, vectors
from experiments.laboratory.networks.tasks import Examples, Task


def layers(params, x):
    """A perceptron in NumPy."""
    for matrix in params[:-1]:
        x = np.maximum(np.append(x, np.ones((len(x), 1)), 1) @ matrix, 0)
    return np.append(x, np.ones((len(x), 1)), 1) @ params[-1]


def test_a_perceptron_is_its_matrices_with_a_one_beside_what_they_read():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(4, 5)).astype(np.float32), rng.normal(size=(6, 2)).astype("f4")]
    x = rng.normal(size=(7, 3)).astype(np.float32)
    np.testing.assert_allclose(
        models.perceptron(params, x), layers(params, x), rtol=1e-4, atol=1e-5
    )


def transformer(params, words):
    """One sentence, without padding, in NumPy."""
    qkv, out, up, down, last = (np.asarray(x, np.float64) for x in params)

    def normalised(x):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    d, heads = words.shape[1], 4
    x = words.astype(np.float64)
    queries, keys, values = np.split(normalised(x) @ qkv, 3, axis=-1)
    heard = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * d // heads, (head + 1) * d // heads)
        weights = np.exp(queries[:, part] @ keys[:, part].T / np.sqrt(d // heads))
        heard[:, part] = weights / weights.sum(1, keepdims=True) @ values[:, part]
    x = x + heard @ out
    x = x + np.maximum(normalised(x) @ up, 0) @ down
    return np.append(normalised(x).mean(0), 1.0) @ last


def test_the_transformer_reads_words_and_no_padding():
    rng = np.random.default_rng(1)
    shapes = [(8, 24), (8, 8), (8, 16), (16, 8), (9, 2)]
    params = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    sentences = np.zeros((2, 5, 8), np.float32)
    sentences[0, :3], sentences[1] = rng.normal(size=(3, 8)), rng.normal(size=(5, 8))
    expected = [transformer(params, sentences[0, :3]), transformer(params, sentences[1])]
    found = models.transformer(params, sentences)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    blank = models.transformer(params, np.zeros((1, 5, 8), np.float32))
    np.testing.assert_allclose(blank[0], params[-1][-1], rtol=1e-6)


def test_digits_are_means_of_four_pixels_and_no_digit_is_in_two_splits():
    task = tasks.digits("mnist")
    splits = [task.train, task.validation, task.test]
    assert [len(x.labels) for x in splits] == [7_000, 1_000, 2_000]
    images = np.concatenate([x.inputs for x in splits])
    pixels, _ = tasks.images.load("mnist")
    four = [pixels[:1, i::2, j::2, 0].reshape(1, -1) for i in (0, 1) for j in (0, 1)]
    same = np.abs(images - sum(four) / 4).max(1) < 1e-6
    assert same.sum() == 1 and len(images) == 10_000
    sums = np.sort(images.sum(1))
    np.testing.assert_allclose(sums, np.sort(pixels.sum((1, 2, 3))) / 4, rtol=1e-4)


def test_the_bundled_images_are_split_once_for_the_dense_network():
    task = tasks.mnist("mnist", (4,))
    assert task.train.inputs.shape == (8000, 784) and task.test.inputs.shape == (2000, 784)
    together = np.concatenate([task.train.inputs, task.test.inputs])
    assert len(np.unique(together, axis=0)) == 10_000
    assert task.train.labels.shape == (8000,) and set(task.test.labels) == set(range(10))
    kernels = [layer["kernel"].shape for layer in task.init(jax.random.key(0))]
    assert kernels == [(784, 4), (4, 10)]


@pytest.mark.parametrize("load", [lambda: tasks.mnist("other", ()), lambda: tasks.digits("other")])
def test_images_of_another_size_are_refused(load, monkeypatch):
    colours = np.zeros((3, 32, 32, 3), np.float32), np.zeros(3, np.int32)
    monkeypatch.setattr(tasks.images, "load", lambda source, split: colours)
    with pytest.raises(ValueError, match=r"data must be of 28 x 28 pixels, got 'other' of \(32,"):
        load()


def test_a_dense_network_is_its_kernels_and_its_biases():
    rng = np.random.default_rng(7)
    params = [
        {"kernel": rng.normal(size=shape).astype("f4"), "bias": rng.normal(size=shape[1])}
        for shape in ((5, 4), (4, 3))
    ]
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    x = rng.normal(size=(6, 5)).astype(np.float32)
    matrices = [np.append(layer["kernel"], layer["bias"][None], axis=0) for layer in params]
    np.testing.assert_allclose(models.dense(params, x), layers(matrices, x), rtol=1e-4, atol=1e-5)


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("falls", [False, True])
def test_adam_takes_a_step_for_each_batch(falls):
    """Of Kingma and Ba's Algorithm 1, in NumPy, on the batches that its keys draw."""
    task, batches = plane(30), jax.random.split(jax.random.key(3), 5)
    options = {"rate": 0.1, "falls": falls, "batch_size": 4}
    (found,) = training.adam(task, jax.random.key(2), batches, **options)
    w = np.asarray(task.init(jax.random.key(2))[0], np.float64)
    m = v = np.zeros_like(w)
    for i, key in enumerate(batches):
        x, y = map(np.asarray, task.train.draw(key, 4))
        chances = np.exp(x @ w) / np.exp(x @ w).sum(1, keepdims=True)
        g = x.T @ (chances - np.eye(2)[y]) / 4
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = 0.1 * (1 - i / 5) if falls else 0.1
        unbiased = m / (1 - 0.9 ** (i + 1)), v / (1 - 0.999 ** (i + 1))
        w = w - rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-8)
    np.testing.assert_allclose(found, w, rtol=1e-3, atol=1e-4)


def write(folder, count):
    rng = np.random.default_rng(2)
    good, bad = ["warm", "bright", "kind"], ["cold", "dull", "rude"]
    for split in ("train", "dev", "test"):
        lines = []
        for i in range(count):
            some = rng.permutation((bad, good)[i % 2])[:2]
            lines.append(f"{some[0]} film {some[1]} {'once ' if i < 3 else ''}\t{i % 2}")
        (folder / f"{split}.tsv").write_text("\n".join(lines))


def test_words_that_share_sentences_have_like_vectors_and_labels_are_not_asked(tmp_path):
    write(tmp_path, 40)
    tokens, labels = tasks._held(str(tmp_path), "train")
    assert labels.tolist() == [0, 1] * 20 and len(tokens[5]) == 3
    numbers = vectors.numbers(tokens)
    assert "once" not in numbers and sorted(numbers.values()) == list(range(1, 8))
    bags = vectors.bags([*tokens, ["unknown", "film", "film"]], numbers)
    assert bags[-1].sum() == 1 and bags[-1, numbers["film"] - 1] == 1
    found = vectors.vectors(bags, 7)

    often, together = bags.sum(0), bags.T @ bags
    chances = together / len(bags) / np.outer(often / len(bags), often / len(bags))
    information = np.log(np.maximum(chances, 1.0))
    rows = information / np.maximum(np.linalg.norm(information, axis=1, keepdims=True), 1e-6)
    alike = found @ found.T  # all components: angles are those of the rows themselves
    np.testing.assert_allclose(alike, rows @ rows.T, atol=1e-4)
    place = {word: i - 1 for word, i in numbers.items()}
    assert alike[place["warm"], place["kind"]] > 0.5 > alike[place["warm"], place["cold"]]
    few = vectors.vectors(bags, 2)
    assert few.shape == (7, 2) and (few[place["film"]] == 0).all()  # which is in all sentences


def test_sentences_and_words_come_from_the_same_splits(tmp_path):
    write(tmp_path, 40)
    task = tasks.sentences(str(tmp_path), width=3)
    np.testing.assert_allclose(task.train.inputs.mean(0), 0.0, atol=1e-4)
    weights, *_ = np.linalg.lstsq(task.train.inputs, 2.0 * task.train.labels - 1, rcond=None)
    assert ((task.test.inputs @ weights > 0) == task.test.labels).all()
    read = tasks.words(str(tmp_path), width=4)
    assert read.train.inputs.shape == (40, 16, 4) and (read.train.inputs[0, 3:] == 0).all()
    assert [x.shape for x in read.init(jax.random.key(0))][-1] == (5, 2)
    with pytest.raises(ValueError, match="7 words that occur 4 times are too few for vectors of 8"):
        tasks.words(str(tmp_path), width=8)
    (tmp_path / "other.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    with pytest.raises(ValueError, match=r"other.jsonl' holds no praise"):
        tasks.words(str(tmp_path / "other.jsonl"))


def test_pictures_are_seen_as_the_last_layer_sees_them(tmp_path, monkeypatch):
    network = image_models.ResNet(width=2)
    params = network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    image_models.save_params(tmp_path / "resnet.npz", params)
    params = image_models.load_params(tmp_path / "resnet.npz")
    rng = np.random.default_rng(3)
    pixels = {x: rng.random((150, 32, 32, 3), np.float32) for x in ("train", "test")}
    labels = rng.integers(0, 10, 150).astype(np.int32)
    monkeypatch.setattr(tasks.images, "load", lambda source, split: (pixels[split], labels))
    monkeypatch.setattr(tasks, "_PICTURES", {"train": 150, "test": 100})
    monkeypatch.setattr(tasks, "_VALIDATION", 50)
    task = tasks.pictures("somewhere", str(tmp_path / "resnet.npz"))
    assert task.train.inputs.shape == task.test.inputs.shape == (100, 16)

    last = params["Dense_0"]
    order = np.random.default_rng(0).permutation(150)[:100]
    seen = np.asarray(image_models.apply(params, pixels["test"][order]))
    columns = np.append(task.test.inputs, np.ones((100, 1)), 1)  # standardised: up to an affine map
    fitted = columns @ np.linalg.lstsq(columns, seen, rcond=None)[0]
    np.testing.assert_allclose(fitted, seen, atol=1e-4 * np.abs(np.asarray(last["kernel"])).max())
    assert task.test.labels.tolist() == labels[order].tolist()
    with pytest.raises(ValueError, match="weights must be a ResNet's, got 'mnist'"):
        tasks.pictures("somewhere", "mnist")
    with pytest.raises(FileNotFoundError, match=r"weights: there is no file 'nowhere\.npz'"):
        tasks.pictures("somewhere", "nowhere.npz")


def linear(params, inputs):
    return inputs @ params[0]


def plane(count=200):
    """Two classes in the plane, a line between them."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(3, count, 2)).astype(np.float32)
    splits = [Examples(part, (part[:, 0] > part[:, 1]).astype(np.int32)) for part in x]
    return Task(linear, lambda key: [jax.random.normal(key, (2, 2)) * 0.1], *splits)


@jax.numpy_dtype_promotion("standard")  # which optax.adam needs
def test_the_best_rate_is_the_validation_splits_and_the_test_split_is_read():
    task = plane()
    lanes = training.by_backpropagation(task, 3, steps=1)
    make = methods.in_turn(("mezo",), 2, 0.01)
    rates, shape = (0.01, 3.0, 1e6), {"steps": 20, "batch_size": 16}
    key = jax.random.key(1)
    best = training.at_best_rate(task, make, lanes, key, rates, **shape)
    keys = jax.random.split(key, 3)

    def alone(lane, rate):
        rate = jnp.float32(rate)
        return training.by_queries(task, make, lanes[lane], keys[lane], rate, **shape)

    tried = training.scores(task, [alone(2, x)[0] for x in rates], task.validation)["loss"]
    assert best["rate"] == rates[int(np.argmin(tried))] == 3.0 and not best["at_edge"]
    assert best["queries"] == alone(0, 3.0)[1] == 20 * 2 * 2
    reported = training.scores(task, [alone(i, 3.0)[0] for i in range(2)], task.test)
    assert {name: best[name] for name in reported} == reported
    assert training.at_best_rate(task, make, lanes, key, rates[:2], **shape)["at_edge"]


def test_scores_are_those_of_the_softmax():
    task = plane(50)
    params = [jnp.array([[2.0, -1.0], [0.5, 1.0]])]
    logits = np.asarray(task.test.inputs @ np.asarray(params[0]), np.float64)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(50), task.test.labels]).mean()
    found = training.scores(task, [params, [params[0] * np.nan]], task.test)
    assert found["loss"] == [pytest.approx(loss, rel=1e-5), None]
    right = (logits.argmax(1) == task.test.labels).mean()
    assert found["accuracy"][0] == pytest.approx(right)


SLOPES = ("caq_zo", "off_grid", "quzo", "qzo", "mezo")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("caq_zo", "qzo") else pytest.param(name, marks=pytest.mark.slow)
        for name in SLOPES
    ],
)
def test_a_rate_along_slopes_means_the_same_to_all_methods(name):
    """On a linear loss, E[move . slope] is -rate / d |slope|^2, in values."""
    rng = np.random.default_rng(5)
    slope = rng.normal(size=(4, 8)).astype(np.float32)
    start = jnp.asarray(rng.uniform(-0.5, 0.5, (4, 8)), jnp.float32).at[0, 0].set(1.0)
    is_float = name in methods.FLOATS
    params = [start if is_float else zq.Quantizer(6, block=4)(start)]
    if name == "qzo":  # whose slope is that of the scales
        levels = np.asarray(zq.dequantize(params)[0] / params[0].broadcast_scales(params[0].scale))
        scale_slope = (slope * levels).reshape(4, 2, 4).sum(-1)
        expected = -((scale_slope**2).sum()) / scale_slope.size / params[0].grid.largest ** 2
    else:
        expected = -(slope**2).sum() / slope.size
    make, rate = methods.in_turn((name,), 2, 0.05), 0.02

    @jax.jit
    @jax.vmap
    def moved(key):
        (tx,) = make(params, key, lambda count: jnp.float32(rate))
        loss = lambda params: jnp.sum(params[0] * slope)  # noqa: E731
        updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
        return zq.dequantize(optax.apply_updates(params, updates))[0]

    after = np.asarray(moved(jax.random.split(jax.random.key(6), 4_096)))
    found = ((after - np.asarray(zq.dequantize(params)[0])) * slope).sum((1, 2))
    error = found.std() / np.sqrt(found.size)
    # Blocks differ in their steps, and a mean step serves all; a masked or clipped code is lost.
    assert abs(found.mean() / rate - expected) < 5 * error / rate + 0.15 * abs(expected)


def test_signs_step_by_a_rate_over_the_root_of_how_many_numbers_train():
    rate, d = 0.5, 100
    start = [jnp.zeros((10, 10))]
    loss = lambda params: jnp.sum(params[0])  # noqa: E731
    for name in ("zo_signsgd", "zoqo floor"):
        params = start if name in methods.FLOATS else [zq.Quantizer(8, range=1.0)(start[0])]
        (tx,) = methods.in_turn((name,), 1, 0.01)(params, jax.random.key(0), lambda count: rate)
        updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
        after = zq.dequantize(optax.apply_updates(params, updates))[0]
        long = rate / d**0.5
        whole = long if name in methods.FLOATS else np.floor(long * 127.5) / 127.5
        sizes = np.abs(np.asarray(after))
        np.testing.assert_allclose(sizes[sizes > 0], whole, rtol=1e-5)
        assert sizes.max() > 0


def test_below_a_code_a_dithered_step_moves_what_it_probes_by_one():
    params = [zq.Quantizer(4, range=1.0)(jnp.zeros((100, 100)))]
    step = 2 / 15
    (tx,) = methods.in_turn(("zoqo dithered",), 1, 0.01)(
        params, jax.random.key(0), lambda count: 0.1 * step * 100
    )
    loss = lambda params: jnp.sum(params[0])  # noqa: E731
    updates, _ = tx.update(None, tx.init(params), params, value_fn=loss)
    after = optax.apply_updates(params, updates)[0].codes.astype(jnp.int32)
    moved = after - params[0].codes.astype(jnp.int32)
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert abs(float(jnp.abs(moved).mean()) - 0.1 * 2 / 3) < 0.01  # a third of the law is zero


def test_units_are_means_over_matrices():
    params = [zq.Quantizer(4, range=1.0)(jnp.zeros((2, 3))), zq.nf4(2)(jnp.ones((2, 2)))]
    unit = methods.units(params)
    assert (unit.codes, unit.scales, unit.top) == (10, 3, 7.0)
    np.testing.assert_allclose(unit.step, (2 / 15 + 2 / 15) / 2, rtol=1e-6)
    np.testing.assert_allclose(unit.size, (7 * 2 / 15 + 1.0) / 2, rtol=1e-6)
