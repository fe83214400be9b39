"""What tests of randomness ask of draws, with few enough false alarms."""

import jax
import numpy as np

from zoqo_jax.xla import compiler, random_bits


def assert_binomial(hits, trials, probability):
    """Within 4.5 standard errors (one false alarm in 150,000, were the keys not fixed)."""
    error = 4.5 * np.sqrt(trials * probability * (1 - probability))
    assert abs(hits - trials * probability) <= error, (hits, trials * probability)


def assert_identity_covariance(samples):
    """Every coordinate has variance 1, every pair of coordinates no correlation."""
    covariance = samples.T @ samples / len(samples)
    error = np.abs(covariance - np.eye(samples.shape[1])).max()
    assert error < 5 / np.sqrt(len(samples))


def assert_uncorrelated(samples):
    """No pair of columns is correlated, whatever their laws."""
    correlation = np.corrcoef(samples, rowvar=False)
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(samples))


def random_words(function, *args, monkeypatch, rounds=1):
    """How many random words `draws` makes for a function whose loops make so many rounds."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.params.get("name") == "_threefry":
                total += sum(words.aval.size for words in equation.outvars)
                continue
            for name, times in (("jaxpr", 1), ("body_jaxpr", rounds)):
                if name in equation.params:
                    total += times * count(equation.params[name].jaxpr)
        return total

    with monkeypatch.context() as patch:
        patch.setattr(random_bits, "_threefry", jax.jit(random_bits._threefry))
        patch.setattr(
            compiler, "materialized", lambda make, *_: make()
        )  # no loop but those that draw
        return count(jax.make_jaxpr(function)(*args).jaxpr)


def mean_and_error(samples):
    """The mean of samples and its standard error."""
    samples = np.asarray(samples, np.float64)
    return samples.mean(axis=0), samples.std(axis=0) / np.sqrt(len(samples))
