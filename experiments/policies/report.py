"""What a person sees of runs: a table, curves, and episodes of the trained policies."""

from __future__ import annotations

from pathlib import Path

import jax

import zoqo_jax as zq
from experiments import markdown
from experiments.files import write_text
from experiments.policies import environments, episode, pages, training
from experiments.policies.config import Config

__all__ = ["Report"]


class Report:
    """Writes them, again after each run.

    Args:
      results: folder of results.
      document: Markdown to write the table into, the pictures being in the folder beside it that is
        called as it is; None for a file in `results`, and the pictures beside it.
    """

    def __init__(self, results: Path, document: Path | None) -> None:
        self._results, self._document = results, document
        self._pictures = document.parent / document.stem if document else results

    def write(self) -> str:
        """Write the table and the curves, and say what is there."""
        found = pages.load(self._results)
        body = {"returns": pages.returns(found), "shaping": pages.shapings(found)}
        pages.curves(found, self._pictures / "returns.png")
        if self._document:
            markdown.fill(self._document, body.get)
        else:
            text = f"# Policies\n\n{body['returns']}\n\n![Returns](returns.png)\n"
            write_text(self._results / "returns.md", text)
        return f"\n{body['returns']}\n\nreturns of the trained policies: {self._pictures}/"

    def episode(self, config: Config) -> None:
        """Draw an episode of what a run of seed 0 trained."""
        layers = training.policy(config, self._results)
        if layers is None:
            return
        game = environments.make(config)
        played = game.play(zq.dequantize(layers), jax.random.key(0))
        words = pages.name(config).replace(" (evosax)", "")
        path = self._pictures / f"{training.row_of(config).stem(0)}.gif"
        episode.gif(game, played, f"{config.environment}\n{words}", path)
