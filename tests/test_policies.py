"""Policies: populations on one batch, all on the same episodes; runs go on bit for bit."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments import command
from experiments.policies import __main__ as policies
from experiments.policies import environments, episode, methods, pages, training
from experiments.policies.config import ENVIRONMENTS, Config

_TINY = Config(population=4, episodes=2, generations=3, hidden=4, test_episodes=2)


@pytest.fixture(autouse=True)
def _mixed_dtypes():
    """gymnax and evosax mix them."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def game():
    return environments.make(_TINY)


def _quantized(game, bits=8):
    return zq.quantize(game.start(jax.random.key(1)), zq.Quantizer(bits))


def test_a_population_on_one_batch_is_one_by_one(game):
    """Side by side, episodes end one after another: none goes on, or ends, because of others."""
    params, keys = _quantized(game), jax.random.split(jax.random.key(2), 2)
    loss = lambda layers: -game.mean_return(layers, keys)  # noqa: E731
    tx = zq.zoqo(0.1, 0.3, key=jax.random.key(0), num_queries=3, query_batch=None)
    state = tx.init(params)
    _, heard = jax.jit(lambda: tx.update(None, state, params, value_fn=loss))()
    alone = jax.jit(game.episode)
    for query in range(3):
        probes = tx.probes(state, params, query)
        for place, side in enumerate((1, -1)):
            end = zq.dequantize(zq.queries.endpoints(params, probes, side))
            expected = -np.mean([alone(end, key) for key in keys])
            assert heard.info.losses[query, place] == expected
    assert len(set(heard.info.losses.reshape(-1).tolist())) > 1


def test_an_episode_that_is_shown_ends_with_the_first_end(game):
    """A pole that has fallen swings on, and may stand again."""
    played = game.play(game.start(jax.random.key(5)), jax.random.key(6))
    assert played.length == float(played.rewards[: played.length].sum()) < 100


def test_equal_policies_have_equal_returns(game):
    """All play the same episodes: where both sides of a query act alike, they return the same."""
    params = _quantized(game)
    keys = jax.random.split(jax.random.key(2), 2)
    tx = zq.zoqo(0.1, 0.3, key=jax.random.key(0), num_queries=2, query_batch=None)
    always = lambda layers: [0 * layers[0], 0 * layers[1], layers[2].at[:].set(0)]  # noqa: E731
    loss = lambda layers: -game.mean_return(always(layers), keys)  # noqa: E731
    state = tx.init(params)
    _, state = jax.jit(lambda: tx.update(None, state, params, value_fn=loss))()
    assert len(set(state.info.losses.reshape(-1).tolist())) == 1
    np.testing.assert_array_equal(state.info.loss_differences, 0.0)


_SLOW = pytest.mark.slow  # each compiles a program of its own


@pytest.mark.parametrize(
    "method, bits",
    [
        ("zoqo", 8),
        pytest.param("qes", 2, marks=_SLOW),
        pytest.param("open_es", 32, marks=_SLOW),
        pytest.param("spsa", 32, marks=_SLOW),
        pytest.param("caq_zo", 4, marks=_SLOW),
    ],
)
def test_a_run_goes_on_bit_for_bit(method, bits, tmp_path, monkeypatch):
    config = dataclasses.replace(_TINY, method=method, bits=bits)
    monkeypatch.setattr(training, "_CHUNK", 1)
    whole = training.train(config, training.store_of(config, tmp_path / "whole"))

    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    store = training.store_of(config, tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        training.train(config, store, stop)
    assert not store.path.exists()  # what is not over is no result
    assert len(list(store.path.parent.glob("*.run.npz"))) == 1
    again = training.train(config, training.store_of(config, tmp_path / "stopped"))
    assert {**again, "seconds": 0} == {**whole, "seconds": 0}
    both = [training.policy(config, tmp_path / name) for name in ("whole", "stopped")]
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(store.path.parent.glob("*.run.npz"))
    assert training.train(config, training.store_of(config, tmp_path / "stopped")) == again
    assert training.program(config).chunk._cache_size() == 1  # compiled once for all chunks


def test_ranks_say_nothing_of_units():
    losses = jnp.array([[3.0, 1.0], [1.0, 9.0]])
    expected = [[1 / 6, -1 / 3], [-1 / 3, 1 / 2]]
    np.testing.assert_allclose(methods.ranked(losses), expected, atol=1e-6)
    np.testing.assert_array_equal(methods.ranked(1e6 * losses**3), methods.ranked(losses))


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(x, marks=[_SLOW] * (x not in ("Pendulum-v1", "CartPole-v1")))
        for x in ENVIRONMENTS
    ],
)
def test_every_environment_is_played_and_drawn(environment, tmp_path):
    config = dataclasses.replace(_TINY, environment=environment)
    game = environments.make(config)
    layers = game.start(jax.random.key(0))
    params = game.params.replace(max_steps_in_episode=5)
    game = game._replace(params=params)
    played, key = game.play(layers, jax.random.key(3)), jax.random.key(3)
    total = float(played.rewards[: played.length].sum())
    np.testing.assert_allclose(float(jax.jit(game.episode)(layers, key)), total, rtol=1e-6)
    episode.gif(game, played, environment, tmp_path / "one.gif")
    assert (tmp_path / "one.gif").read_bytes()[:6] == b"GIF89a"


@pytest.mark.slow
def test_comparisons_of_returns_move_codes(tmp_path):
    config = dataclasses.replace(_TINY, shaping="comparisons", radius=0.5)
    found = training.train(config, training.store_of(config, tmp_path))
    assert len(found["population"]) == 3 and max(found["codes_moved"]) > 0


@pytest.mark.parametrize(
    "given, message",
    [
        ({"environment": "Ant-v4"}, "environment must be one of .*got 'Ant-v4'"),
        ({"bits": 9}, "bits must be in .2, 8. for zoqo, got 9"),
        ({"method": "open_es"}, "bits must be 32 for open_es, got 8"),
        ({"population": 5}, "population must be a multiple of 2, got 5"),
        ({"method": "qes", "shaping": "comparisons"}, "shaping must not be 'comparisons' for qes"),
        ({"method": "spsa", "bits": 32, "shaping": "ranks"}, "shaping must be of .* for spsa"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite and not negative, got nan"),
    ],
)
def test_bad_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        Config(**given)


def test_missing_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match=r"gymnax is not installed: .*\[experiments,policies\]"):
        environments.make(_TINY)
    monkeypatch.setitem(sys.modules, "evosax.algorithms", None)
    config = dataclasses.replace(_TINY, method="open_es", bits=32)
    with pytest.raises(ImportError, match=r"evosax is not installed: .*\[experiments,policies\]"):
        methods.trainer(config, lambda layers, keys: 0.0).start([jnp.ones(2)], jax.random.key(0))


def test_the_command_makes_a_table_once(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHUNK", 1)  # a program that is compiled already
    document = tmp_path / "policies.md"
    document.write_text("<!-- table: returns -->\n<!-- end -->\n")
    folder = tmp_path / "results"
    line = ["--environments=CartPole-v1", "--methods=zoqo", "--bits=8", "--population=4"]
    line += ["--episodes=2", "--generations=3", "--hidden=4", "--test-episodes=2", "--no-progress"]
    line += [f"--results={folder}", f"--document={document}"]

    def run():
        kinds = (policies.main, policies.Runs, Config)
        command.run(*kinds, about="", argv=line, leave_out=["environment", "method", "seed"])
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    before = run()
    assert "| ZOQO, 8 bits   |" in document.read_text()
    names = {path.name for path in (tmp_path / "policies").iterdir()}
    assert names == {"returns.png", "cartpole_v1_zoqo_8_bits_0.gif"}
    assert run() == before


def test_the_command_refuses_an_unknown_environment():
    line = [sys.executable, "-m", "experiments.policies", "--environments=Ant-v4"]
    process = subprocess.run(line, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert process.returncode == 2 and "--environments must be of" in process.stderr
    assert "Ant-v4" in process.stderr


def test_committed_results_are_whole():
    folder = Path(policies.__file__).parent / "results"
    for config, runs in pages.load(folder):
        assert all(len(run["population"]) == config.steps for run in runs), pages.name(config)
        assert np.isfinite([run["final"] for run in runs]).all()
