"""A trained policy at play: an episode as a GIF, drawn from gymnax's states.

gymnax's own visualizer needs gymnasium's renderers, pygame and box2d among them, for pictures of
a pole on a cart; these few lines need matplotlib, and draw all five environments.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.policies.environments import Game, Played

__all__ = ["gif", "strip"]

_FRAMES = 60  # of a GIF, at most
_PER_SECOND = 15


def gif(game: Game, played: Played, title: str, path: Path) -> None:
    """Write an episode as a GIF of at most 60 moments, evenly spread."""
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    moments = _spread(played, _FRAMES)
    fig = Figure(figsize=(2.6, 2.3), layout="constrained")
    axis = fig.add_subplot()

    def draw(moment: int) -> list[Any]:
        _frame(axis, game, played, moment)
        axis.set_title(f"{title}\nmoment {moment}, return {_until(played, moment):.0f}", fontsize=7)
        return []

    # The first moment would be drawn twice, by an initial call.
    film = FuncAnimation(fig, draw, frames=moments, init_func=lambda: [])
    path.parent.mkdir(parents=True, exist_ok=True)
    film.save(str(path), writer=PillowWriter(fps=_PER_SECOND), dpi=72)


def strip(axes: Any, game: Game, played: Played) -> None:
    """Draw as many moments of an episode as there are axes, evenly spread."""
    for axis, moment in zip(axes, _spread(played, len(axes)), strict=False):
        _frame(axis, game, played, moment)
        axis.set_title(f"moment {moment}", fontsize=8)


def _spread(played: Played, count: int) -> list[int]:
    last = played.length - 1
    return sorted(set(np.linspace(0, last, min(count, played.length)).round().astype(int).tolist()))


def _until(played: Played, moment: int) -> float:
    return float(np.asarray(played.rewards[: moment + 1]).sum())


def _frame(axis: Any, game: Game, played: Played, moment: int) -> None:
    axis.clear()
    axis.set_xticks([])
    axis.set_yticks([])
    state = jax.tree.map(lambda x: np.asarray(x[moment]), played.states)
    _DRAWN[game.env.name](axis, game, state)


def _cart_pole(axis: Any, game: Game, state: Any) -> None:
    far, pole = float(game.params.x_threshold), 2 * float(game.params.length)
    top = state.x + pole * np.sin(state.theta), pole * np.cos(state.theta)
    axis.axhline(0, color="0.6", lw=0.8)
    axis.plot([state.x - 0.25, state.x + 0.25], [0, 0], color="k", lw=8, solid_capstyle="butt")
    axis.plot([state.x, top[0]], [0, top[1]], color="#D55E00", lw=3)
    axis.set(xlim=(-far, far), ylim=(-0.6, 2.0), aspect="equal")


def _pendulum(axis: Any, game: Game, state: Any) -> None:
    axis.plot([0, np.sin(state.theta)], [0, np.cos(state.theta)], color="#D55E00", lw=5)
    axis.plot(0, 0, "o", color="k", ms=5)
    axis.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), aspect="equal")


def _acrobot(axis: Any, game: Game, state: Any) -> None:
    first, both = state.joint_angle1, state.joint_angle1 + state.joint_angle2
    x = np.cumsum([0, np.sin(first), np.sin(both)])
    y = -np.cumsum([0, np.cos(first), np.cos(both)])
    axis.axhline(1, color="0.6", lw=0.8, ls="--")
    axis.plot(x, y, "-o", color="#D55E00", lw=3, ms=4, mfc="k", mec="k")
    axis.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")


def _mountain_car(axis: Any, game: Game, state: Any) -> None:
    height = lambda x: np.sin(3 * x)  # noqa: E731
    low, high = float(game.params.min_position), float(game.params.max_position)
    road = np.linspace(low, high, 100)
    axis.plot(road, height(road), color="0.6", lw=1)
    axis.plot(state.position, height(state.position) + 0.06, "o", color="#D55E00", ms=7)
    axis.axvline(float(game.params.goal_position), color="k", lw=0.8, ls="--")
    axis.set(xlim=(low, high), ylim=(-1.2, 1.3))


def _cells(axis: Any, game: Game, state: Any) -> None:
    seen = np.asarray(game.env.get_obs(state))
    kinds = np.arange(1, seen.shape[-1] + 1)
    axis.imshow((seen * kinds).max(-1), cmap="magma", vmin=0, vmax=kinds[-1])


_DRAWN: dict[str, Callable[[Any, Game, Any], None]] = {
    "CartPole-v1": _cart_pole,
    "Pendulum-v1": _pendulum,
    "Acrobot-v1": _acrobot,
    "MountainCarContinuous-v0": _mountain_car,
    "Breakout-MinAtar": _cells,
}
