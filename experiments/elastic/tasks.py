"""The task of a run, by the kind of its settings."""

from typing import Any

from experiments.elastic.config import Module
from experiments.elastic.task import Task, of_module

__all__ = ["task_of"]


def task_of(run: Any) -> Task:
    """The task that settings describe."""
    if isinstance(run, Module):
        return of_module(run)
    raise TypeError(f"run must be settings of a task, got {type(run).__name__}.")
