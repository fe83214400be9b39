"""What a query of each way to train says: `python -m experiments.finetune.slopes`.

A step of a zeroth-order method is a guess at the gradient. At a model as it is, and at models that
runs left behind, this compares the guesses of each row of `curves.py` with the true gradient, by
back-propagation over N training sentences, and says what that makes of a forward pass.

A query looks along u and hears the slope b = u g_B of a batch of B examples. With g the gradient of
all, in the coordinates in which u is drawn,

- `dims` is |u|^2 |g|^2 / E(u g)^2, how many numbers the directions search as if they were all of
  like worth: of independent entries the number of entries;
- `noise` is E(u g_i)^2 / E(u g)^2 of single examples i: how much larger their slopes are, squared;
- the sum of T guesses b u has with g a squared cosine of about T B / (noise dims), while that is
  small: `predicted`, beside the one that was `measured`;
- a step along b u of the best length lowers the loss by (u g)^2 / (2 (1 + noise / B) E u H u) on
  average, H the Hessian: `gain`, for 1,000 forward passes. In it dims do not occur: directions are
  good that are steep for how much they are curved, and steep in all examples.

Only `gain` says which way is the best, as it does not depend on coordinates. The true gradient is
of N sentences, and noisy itself: |g|^2 is too large by the share noise / N, and where `noise` comes
to about N, the gradient is not known at all.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("slopes: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import zoqo_jax as zq
from experiments.files import writable
from experiments.finetune import curves, curves_page, data, objective, states
from experiments.finetune.batches import training_tokens
from experiments.finetune.config import Config
from experiments.finetune.methods import transformation
from experiments.finetune.models import loading
from experiments.finetune.parts import Parts, adapt
from experiments.store import Store, storing
from zoqo_jax.grids.arrays import is_trained, trained_leaves
from zoqo_jax.implicit.lora import merge
from zoqo_jax.transforms import floats

__all__ = ["Heard", "Wanted", "figures"]

_EACH = "ZOQO, 8-bit adapters"  # which directions of an example each are measured of, too
_OF_EACH = f"{_EACH}, a direction for each example"
# Of directions of floats, as a share of a leaf's root mean square, or by itself where all are zero.
# With 2^-8 of the mean square the curvature of adapters drowned in what float32 rounds off.
_RADIUS, _RADIUS_OF_ZEROS = 2.0**-3, 2.0**-8


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to compare, and where things are.

    Attributes:
      models: files of models at which guesses are compared, "smollm2" or a run's model.gguf.
      names: what to call them.
      layers: how many of the last layers train.
      queries: how many guesses of each row.
      examples: how many training sentences the true gradient is of.
      only: only rows whose name holds this.
      results: folder of what was found.
      cache: folder of the states of frozen layers, which runs may share.
      document: what to write the table into.
      sst2: "tfds:sst2", or a folder of train.tsv, dev.tsv and test.tsv.

    Raises:
      ValueError: a setting outside what is said above.
    """

    models: tuple[str, ...] = ("smollm2",)
    names: tuple[str, ...] = ("before training",)
    layers: int = 4
    queries: int = 64
    examples: int = 1024
    only: str = ""
    results: str = curves.Wanted().results
    cache: str = f"{curves.Wanted().work}/states"
    document: str = curves.Wanted().document
    sst2: str = "tfds:sst2"

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse, or would only after minutes."""
        settings.check(self, least={"layers": 1, "queries": 2, "examples": 16})
        if len(self.models) != len(self.names):
            raise ValueError(f"names must be {len(self.models)}, as models, got {self.names}.")


class Heard(NamedTuple):
    """What was heard of directions u, and what is true of them.

    Attributes:
      slopes: u g_i of each direction and example of its batch, (T, B).
      true: u g of each direction, (T,).
      bends: u H u / 2 of each direction and batch, (T,).
      lengths: |u|^2, (T,).
      gradient: |g|^2.
      along: sum over directions of b u g.
      total: | sum over directions of b u |^2.
    """

    slopes: np.ndarray
    true: np.ndarray
    bends: np.ndarray
    lengths: np.ndarray
    gradient: float
    along: float
    total: float


def figures(heard: Heard) -> dict[str, float]:
    """What a table says of directions; see the head of this file.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> g, u = rng.normal(size=500), rng.choice([-1.0, 1.0], (256, 500))
      >>> slopes = (u @ g)[:, None] + u @ rng.normal(size=(500, 16)) * 3  # noise: 9 |g|^2
      >>> guess = (slopes.mean(1)[:, None] * u).sum(0)
      >>> found = figures(Heard(slopes, u @ g, np.full(256, 2.0), (u**2).sum(1), g @ g, guess @ g,
      ...                       guess @ guess))
      >>> round(found["dims"], -2), round(found["noise"])
      (500.0, 9)
      >>> round(found["measured"] / found["predicted"], 1)
      0.9
    """
    count, batch = heard.slopes.shape
    true, single = np.mean(heard.true**2), np.mean(heard.slopes**2)
    noise = max(single / true - 1.0, 0.0)
    dims = np.mean(heard.lengths) * heard.gradient / true
    squared = (noise / batch + 1) * dims / count
    # Slopes of a batch deviate as those of single examples would, if examples are independent.
    pairs = true / (2 * (1 + noise / batch) * 2 * np.mean(heard.bends))
    found = {
        "dims": dims,
        "noise": noise,
        "predicted": (1 / (1 + squared)) ** 0.5,
        "measured": heard.along / (heard.total * heard.gradient) ** 0.5,
        "right": np.mean(heard.slopes.mean(1) * heard.true > 0),
        "gain": 500 * pairs,
    }
    return {name: float(x) for name, x in found.items()}


def main(wanted: Wanted) -> None:
    """Compare what is left, and write the table."""
    folder, document = Path(wanted.results), writable("document", Path(wanted.document))
    rows = [
        row
        for row in curves.rows(curves.Wanted(layers=wanted.layers, sst2=wanted.sst2))
        if row.config.method in ("zoqo", "mezo")  # the others look where these do, or nowhere
    ]
    names = [*(row.name for row in rows), _OF_EACH]
    with storing(folder):
        for name, path in zip(wanted.names, wanted.models, strict=True):
            words = "_".join(name.split())
            store = Store(
                folder / f"slopes_{wanted.layers}_{words}.json",
                {"layers": wanted.layers, "queries": wanted.queries, "examples": wanted.examples},
            )
            left = [
                row for row in rows if wanted.only in row.name and row.name not in store.content
            ]
            point = _Point(path, wanted, left[0].config) if left else None
            for row in left:
                say(f"{name}: {row.name}")
                found = figures(point.heard(row.config))
                store.write(**{row.name: found})
                if row.name == _EACH:
                    store.write(**{_OF_EACH: point.of_each(row.config, found)})
                curves_page.write_slopes(document, folder, wanted.layers, names)
        curves_page.write_slopes(document, folder, wanted.layers, names)
    print(f"table: {document}")


class _Point:
    """A model, the true gradient there, and batches."""

    def __init__(self, path: str, wanted: Wanted, config: Config) -> None:
        whole = loading.load(path)
        below, self.model = loading.split(whole, config.layers_of(whole.architecture.depth))
        texts = data.load_all(wanted.sst2, "", "")["train"]
        # The layers below are those of "smollm2" in every run's file: their states are found again.
        tokens = states.with_states(
            below, training_tokens(texts, whole, config), Path(wanted.cache)
        )
        self.base = _as_floats(self.model.params)
        self.read = jax.jit(lambda params, batch: self._losses(params, batch))
        order = np.random.default_rng(0).permutation(len(tokens))
        batch = config.batch_size
        places = [order[i * batch : (i + 1) * batch] for i in range(len(order) // batch)]
        batches = [objective.batch_of(tokens, some) for some in places]
        self.batches = batches[: wanted.queries]
        self.here = [np.asarray(self.read(self.base, some)) for some in self.batches]
        many = batches[wanted.queries :][: max(wanted.examples // batch, 1)]
        self.gradient = self._gradient(many)

    def _losses(self, params: Any, batch: objective.Batch) -> jax.Array:
        return objective.answers(self.model.decoder)(params, batch)[0]

    def _gradient(self, batches: list[objective.Batch]) -> Any:
        """That of the mean loss, with respect to the layers' matrices, as a list."""
        matrices, join = _matrices(self.base)

        @jax.jit
        def of(matrices: list[jax.Array], batch: objective.Batch) -> list[jax.Array]:
            return jax.grad(lambda some: self._losses(join(some), batch).mean())(matrices)

        total = [jnp.zeros_like(x) for x in matrices]
        for batch in tqdm(batches, desc="true gradient", unit="batch"):
            total = jax.tree.map(jnp.add, total, of(matrices, batch))
        return [x / len(batches) for x in total]

    def heard(self, config: Config) -> Heard:
        """What guesses of a row's kind are like."""
        kind = _Kind(self.model, config, self.batches[0])
        gradient = kind.gradient(self.gradient)

        @jax.jit
        def ends(held: _Held, gradient: list[jax.Array], count: jax.Array) -> Any:
            sides = [kind.displaced(held, count, side) for side in (1, -1)]
            half = [(a - b) / (2 * unit) for a, b, unit in zip(*sides, held.units, strict=True)]
            trees = [_as_floats(kind.tree(held, side)) for side in sides]
            return trees, half, _dot(half, gradient), _dot(half, half)

        add = jax.jit(
            lambda total, half, by: [x + by * y for x, y in zip(total, half, strict=True)]
        )
        total = [jnp.zeros_like(x) for x in gradient]
        slopes, true, bends, lengths = [], [], [], []
        for count, batch in enumerate(tqdm(self.batches, desc="queries", unit="query")):
            sides, half, along, length = ends(kind.held, gradient, jnp.int32(count))
            up, down = (np.asarray(self.read(side, batch)) for side in sides)
            del sides
            slopes.append((up - down) / 2)
            bends.append(((up + down) / 2 - self.here[count]).mean())
            true.append(float(along))
            lengths.append(float(length))
            total = add(total, half, slopes[-1].mean())
        slopes, true = np.array(slopes), np.array(true)
        along = float((slopes.mean(1) * true).sum())
        return Heard(
            slopes,
            true,
            np.array(bends),
            np.array(lengths),
            float(_dot(gradient, gradient)),
            along,
            float(_dot(total, total)),
        )

    def of_each(self, config: Config, shared: dict[str, float]) -> dict[str, float]:
        """The figures of directions of an example each, one code long in all entries.

        Args:
          config: of adapters' codes.
          shared: what was found of one direction for all examples of a batch.
        """
        kind = _Kind(self.model, config, self.batches[0])
        gradient, params = kind.gradient(self.gradient), kind.held.params
        batch_size = config.batch_size
        each = zq.directions.with_options("per_example", examples=batch_size)
        tx = zq.caq_zo(1.0, key=jax.random.key(config.seed), structure=each)
        start = tx.init(params)

        @jax.jit
        def guess(params: Any, count: jax.Array, batch: objective.Batch) -> list[jax.Array]:
            probes = tx.probes(start._replace(count=count), params)
            pair = zq.queries.losses(lambda tree: self._losses(tree, batch), params, probes)
            said = (pair[0] - pair[1]) / 2
            pairs = zip(probes, kind.trained(params), strict=True)
            return [probe.contribute("product", said, leaf) for probe, leaf in pairs]

        total = [jnp.zeros_like(x) for x in gradient]
        for count, batch in enumerate(tqdm(self.batches, desc="queries", unit="query")):
            total = jax.tree.map(jnp.add, total, guess(params, jnp.int32(count), batch))
        lengths = _dot(total, total) * _dot(gradient, gradient)
        measured = float(_dot(total, gradient) / lengths**0.5)
        noise, count = shared["noise"], len(self.batches)
        squared = (noise + 1) / batch_size * shared["dims"] / count
        gain = shared["gain"] * (batch_size + noise) / (1 + noise)
        return {
            **shared,
            "predicted": (1 / (1 + squared)) ** 0.5,
            "measured": measured,
            "gain": gain,
        }


def _dot(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


class _Held(NamedTuple):
    """What programs of a kind are given: closed over, XLA would compute with it as it compiles.

    Attributes:
      params: the model's, ready to be trained.
      values: what trains, as floats.
      units: of each, the length of one in the coordinates in which directions are drawn.
      guides: of directions in columns.
    """

    params: Any
    values: list[jax.Array]
    units: list[jax.Array]
    guides: tuple[Any, ...] = ()


class _Kind:
    """The directions of a way to train."""

    def __init__(self, model: Any, config: Config, batch: objective.Batch) -> None:
        params, self._floats = adapt(model, config), config.moves_floats
        self._parts = Parts.of(params, config)
        self._key = jax.random.key(config.seed)
        if self._floats:
            values, _ = self._parts.split(params)
            at_start = floats.scales_at_start(values)
            radius = _RADIUS if any(x.any() for x in values) else _RADIUS_OF_ZEROS
            units = [radius * x for x in at_start]
            self.held = _Held(params, values, units)
            return
        tx = transformation(config)
        self._steps, self._state = tx.probes.__self__, tx.init(params)
        guides = ()
        if config.guide_every:
            loss = objective.loss_fn(model.decoder)
            seen = zq.observe(lambda params: loss(params, batch), params)
            guides = tuple(seen[name].guide for name in trained_leaves(params))
        leaves = self.trained(params)
        units = [leaf.broadcast_scales(leaf.step) for leaf in leaves]
        self.held = _Held(params, [zq.dequantize(leaf) for leaf in leaves], units, guides)

    @staticmethod
    def trained(tree: Any) -> list[Any]:
        """The leaves of codes that train."""
        return [x for x in jax.tree.leaves(tree, is_leaf=zq.is_quantized) if is_trained(x)]

    def gradient(self, gradient: list[jax.Array]) -> list[jax.Array]:
        """That of the loss with respect to what trains, by that with respect to the matrices."""

        @jax.jit
        def of(held: _Held, gradient: list[jax.Array]) -> list[jax.Array]:
            merged = lambda some: _matrices(_as_floats(self.tree(held, some)))[0]  # noqa: E731
            (of_values,) = jax.vjp(merged, held.values)[1](gradient)
            return [x * unit for x, unit in zip(of_values, held.units, strict=True)]

        return of(self.held, gradient)

    def displaced(self, held: _Held, count: jax.Array, side: int) -> list[jax.Array]:
        """What trains at one end of a query."""
        if self._floats:
            directions = floats.Directions(self._key, 1, "rademacher")
            draws = [directions.draw(count, i, x) for i, x in enumerate(held.values)]
            trios = zip(held.values, draws, held.units, strict=True)
            return [x + side * unit * draw for x, draw, unit in trios]
        steps = dataclasses.replace(self._steps, guides=held.guides)
        probes = steps.probes(self._state._replace(count=count), held.params)
        end = zq.queries.endpoints(held.params, probes, side)
        return [zq.dequantize(leaf) for leaf in self.trained(end)]

    def tree(self, held: _Held, values: list[jax.Array]) -> Any:
        """The parameters with these in place of what trains."""
        if self._floats:
            return self._parts.join(values, self._parts.split(held.params)[1])
        left = iter(values)
        put = lambda leaf: next(left) if is_trained(leaf) else leaf  # noqa: E731
        return jax.tree.map(put, held.params, is_leaf=zq.is_quantized)


def _as_floats(params: Any) -> Any:
    """Parameters whose layers' matrices are arrays of floats."""
    merged = merge(params)

    def one(path: Any, leaf: Any) -> Any:
        return zq.dequantize(leaf) if path[0].key == "layers" and zq.is_quantized(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, merged, is_leaf=zq.is_quantized)


def _matrices(params: Any) -> tuple[list[jax.Array], Any]:
    """The layers' matrices, stacks of them, and what puts others in their places."""
    pairs, shape = jax.tree_util.tree_flatten_with_path(params, is_leaf=zq.is_quantized)
    places = [i for i, (path, x) in enumerate(pairs) if path[0].key == "layers" and x.ndim == 3]

    def join(matrices: list[jax.Array]) -> Any:
        leaves = [x for _, x in pairs]
        for i, matrix in zip(places, matrices, strict=True):
            leaves[i] = matrix
        return jax.tree.unflatten(shape, leaves)

    return [pairs[i][1] for i in places], join


if __name__ == "__main__":
    command.run(main, Wanted, about=__doc__ or "")
