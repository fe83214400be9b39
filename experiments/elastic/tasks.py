"""The task of a run by the kind of its settings, and what is left of it in the end."""

from pathlib import Path
from typing import Any

from experiments.elastic.config import Module
from experiments.elastic.task import Task, of_module

__all__ = ["task_of", "written"]


def task_of(run: Any) -> Task:
    """The task that settings describe."""
    if isinstance(run, Module):
        return of_module(run)
    from experiments.elastic.finetuning import of_finetuning

    return of_finetuning(run)


def written(run: Any, params: Any) -> Path | None:
    """Write the trained model where the run has a folder for it."""
    if isinstance(run, Module):
        return None
    from experiments.elastic.finetuning import write

    return write(run, params)
