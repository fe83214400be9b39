"""What a person sees of attack runs: one table and one figure."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import markdown
from experiments.attack.config import LABEL_METHODS
from experiments.attack.methods import coarse_to_fine, square
from experiments.attack.run import Metrics

__all__ = ["figure", "settings", "table"]

_SHOWN = 5  # images to a row of the figure


def table(runs: Sequence[Metrics]) -> str:
    """The runs as a Markdown table, failures first."""
    head = ["attack", "failure rate", "mean queries", "median", "seconds", "images/s"]
    rows = [
        [
            run.config.name,
            f"{run.failure_rate:.3f}",
            f"{run.mean_queries:.1f}" if run.success.any() else "-",
            f"{run.median_queries:.0f}" if run.success.any() else "-",
            f"{run.seconds:.1f}",
            f"{run.images_per_second:.1f}",
        ]
        for run in runs
    ]
    return markdown.table(head, rows)


def settings(run: Metrics) -> str:
    """The settings that a run read, as it used them, in a line."""
    config = run.config
    used = dataclasses.asdict(config.used(coloured=run.clean.shape[-1] == 3))
    used["num_images"] = run.images
    names = {"dataset", "weights", "weight_bits", "num_images", "epsilon", "budget", "loss"}
    names |= {"targeted", "seed", "batch_size", "model_batch"}
    of_method = {
        "zo_sign_sgd": {"learning_rate", "radius", "num_queries"},
        "square": {"density"},
        "zoqo": {"bits", "structure"},
        "zoqo_labels": {"bits"},
    }
    names |= of_method.get(config.method, set())
    names -= {"loss"} if config.method in LABEL_METHODS else set()
    if config.method == "square":
        used["density"] = config.density or square.SHARE
    elif config.method == "zoqo" and config.structure == "coarse_to_fine":
        names.add("density")
        used["density"] = coarse_to_fine.share(config, run.clean.shape[-1])
    elif config.method == "zoqo":
        names |= {"noise", "step", "learning_rate", "decay_steps", "radius", "num_queries"}
        names |= {"density"} if config.structure == "sparse" else set()
    return ", ".join(
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in used.items()
        if name in names
    )


def figure(runs: Sequence[Metrics], path: str | Path) -> None:
    """Draw images before and after, and failures against queries; the path's suffix says how."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(11.0, 5.6), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1.05, 1.0))
    _draw_images(left, runs[0])
    _draw_failures(right, runs)
    fig.savefig(path, dpi=150)


def _draw_images(fig, run: Metrics) -> None:
    shown = np.flatnonzero(run.success)[:_SHOWN]
    fig.suptitle(f"{run.config.name}: the first images it fooled the network on", fontsize=10)
    if not len(shown):
        fig.text(0.5, 0.5, "none", ha="center")
        return
    axes = fig.subplots(3, len(shown), squeeze=False)
    epsilon = run.config.epsilon
    for column, place in enumerate(shown):
        clean, adversarial = run.clean[place, ..., 0], run.adversarial[place, ..., 0]
        pictures = (clean, adversarial - clean, adversarial)
        for axis, picture, scale in zip(
            axes[:, column],
            pictures,
            (("gray", 0, 1), ("RdBu_r", -epsilon, epsilon), ("gray", 0, 1)),
            strict=True,
        ):
            axis.imshow(picture, cmap=scale[0], vmin=scale[1], vmax=scale[2])
            axis.set_xticks([])
            axis.set_yticks([])
        axes[0, column].set_title(f"{run.labels[place]}", fontsize=10)
        many = "query" if run.queries[place] == 1 else "queries"
        axes[1, column].set_title(f"{run.queries[place]} {many}", fontsize=8)
        axes[2, column].set_title(f"read as {run.predicted[place]}", fontsize=10, color="C3")
    for axis, name in zip(axes[:, 0], ("clean", "perturbation", "adversarial"), strict=True):
        axis.set_ylabel(name, fontsize=9)


def _draw_failures(fig, runs: Sequence[Metrics]) -> None:
    axis = fig.subplots()
    for run in runs:
        queries = np.sort(run.queries[run.success])
        still = 1 - np.arange(1, len(queries) + 1) / run.images
        x = np.concatenate([[1], queries, [run.config.budget]])
        y = np.concatenate([[1.0], still, still[-1:] if len(still) else [1.0]])
        axis.step(x, y, where="post", label=run.config.name)
    axis.set_xscale("log")
    axis.set_xlim(1, max(run.config.budget for run in runs))
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("evaluations of the network, for one image")
    axis.set_ylabel("images not yet misclassified")
    axis.set_title(
        f"{runs[0].images} images, $\\epsilon$ = {runs[0].config.epsilon:g}", fontsize=10
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, framealpha=0.9, loc="upper right")
