"""gymnax's environments as functions of a policy's parameters: episodes and their returns.

Episodes of all policies of a population are played side by side, by `jax.vmap`, until the last
has ended. The policy is a network of two hidden layers whose greatest output is the action, or
whose outputs, squashed into the action's range, are.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from experiments.policies.config import Config

__all__ = ["Game", "Played", "decoded", "make"]

# What observations are divided by, the same for every method: their usual range, which gymnax's
# spaces do not say where it has no bound.
_RANGES = {
    "CartPole-v1": (2.4, 3.0, 0.21, 3.0),
    "Pendulum-v1": (1.0, 1.0, 8.0),
    "Acrobot-v1": (1.0, 1.0, 1.0, 1.0, 6.0, 12.0),
    "MountainCarContinuous-v0": (0.6, 0.07),
    "Breakout-MinAtar": (1.0,),
}


class Played(NamedTuple):
    """An episode: states and rewards of every moment that it may last, and how many it did."""

    states: Any
    rewards: Array
    length: int


class Game(NamedTuple):
    """An environment with the policy that plays it.

    Attributes:
      env: gymnax's.
      params: its constants.
      ranges: what observations are divided by.
      sizes: of the network's layers.
    """

    env: Any
    params: Any
    ranges: Array
    sizes: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Moments that an episode may last."""
        return int(self.params.max_steps_in_episode)

    def start(self, key: Array) -> list[Array]:
        """A network's weights, biases being their last rows, which are zero."""
        keys = jax.random.split(key, len(self.sizes) - 1)
        draw = jax.nn.initializers.he_normal()
        shapes = zip(self.sizes, self.sizes[1:], strict=False)
        layers = [draw(key, shape) for key, shape in zip(keys, shapes, strict=True)]
        return [jnp.pad(layer, ((0, 1), (0, 0))) for layer in layers]

    def act(self, layers: list[Array], observation: Array) -> Array:
        """What the policy does."""
        x = jnp.reshape(observation / self.ranges, -1)
        for i, layer in enumerate(layers):
            x = x @ layer[:-1] + layer[-1]
            x = jax.nn.relu(x) if i < len(layers) - 1 else x
        space = self.env.action_space(self.params)
        return jnp.argmax(x) if hasattr(space, "n") else jnp.tanh(x) * space.high

    def episode(self, layers: list[Array], key: Array) -> Array:
        """The return of one episode."""
        begin, key = jax.random.split(key)
        observation, state = self.env.reset(begin, self.params)
        start = (jnp.int32(0), observation, state, jnp.float32(0.0), jnp.bool_(False))
        moment = functools.partial(self._moment, layers, key)
        return jax.lax.while_loop(lambda now: (now[0] < self.longest) & ~now[4], moment, start)[3]

    def mean_return(self, layers: list[Array], keys: Array) -> Array:
        """The mean return of the episodes of these keys; layers may be implicit arrays."""
        layers = [decoded(layer) for layer in layers]
        return jax.vmap(functools.partial(self.episode, layers))(keys).mean()

    def play(self, layers: list[Array], key: Array) -> Played:
        """An episode to be shown, the same as `episode`."""
        begin, key = jax.random.split(key)
        observation, state = self.env.reset(begin, self.params)
        start = (jnp.int32(0), observation, state, jnp.float32(0.0), jnp.bool_(False))

        def moment(now: Any, _: None) -> Any:
            new = self._moment(layers, key, now)
            return new, (now[2], new[3] - now[3], now[4])

        _, (states, rewards, is_over) = jax.lax.scan(moment, start, None, length=self.longest)
        # What is played on beyond the end may be no end again.
        length = int(jnp.argmax(is_over)) if is_over.any() else self.longest
        return Played(states, rewards, length)

    def _moment(self, layers: list[Array], key: Array, now: Any) -> Any:
        moment, observation, state, total, _ = now
        own = jax.random.fold_in(key, moment)
        action = self.act(layers, observation)
        observation, state, reward, is_over, _ = self.env.step_env(own, state, action, self.params)
        return moment + 1, observation, state, total + reward, jnp.asarray(is_over, bool)


def decoded(layer: Array) -> Array:
    """The values of a layer that may be implicit, once for all moments of all episodes.

    A sum over an axis of one has no rule of its own, so it gets values. Left implicit, the
    population's layers would be decoded again in every moment: five times as slow.
    """
    return layer[None].sum(0)


def make(config: Config) -> Game:
    """The environment of a run, with its policy.

    Raises:
      ImportError: gymnax is not installed.
    """
    try:
        import gymnax
    except ImportError:
        raise ImportError(
            "gymnax is not installed: pip install -e '.[experiments,policies]', or make policies."
        ) from None
    env, params = gymnax.make(config.environment)
    space = env.action_space(params)
    actions = space.n if hasattr(space, "n") else math.prod(space.shape)
    observed = math.prod(env.observation_space(params).shape)
    sizes = (observed, config.hidden, config.hidden, int(actions))
    return Game(env, params, jnp.array(_RANGES[config.environment], jnp.float32), sizes)
