"""The plans that docs/scale.md compares, each a row of one of its tables."""

import dataclasses
from collections.abc import Iterator

from experiments.scale.simulation import Costs, Plan
from experiments.store import Row

__all__ = ["Simulated", "rows"]

_WORKERS = (10, 30, 100, 300, 1_000, 3_000, 10_000)
_MOST_LEASES = 20_000  # of a simulation, some seconds


@dataclasses.dataclass(frozen=True)
class Simulated:
    """One simulation: what is planned, what things take, and how many steps are looked at."""

    plan: Plan
    costs: Costs
    steps: int
    seed: int = 0


def rows(costs: Costs) -> Iterator[Row]:
    """The rows of all tables, at these costs.

    Example:
      >>> sorted({row.table for row in rows(Costs())})
      ['head', 'lease', 'lifetime', 'parts', 'patience', 'workers']
    """

    def row(table: str, name: str, plan: Plan, costs: Costs = costs) -> Row:
        leases = min(plan.queries * plan.parts, 8 * plan.workers)
        steps = min(max(_MOST_LEASES // leases, 3), 200)
        return Row(table, name, Simulated(plan, costs, steps))

    for queries in (64, 1_024, 16_384):
        for workers in _WORKERS:
            yield row(
                "workers", f"{queries:,} queries, {workers:,} workers", Plan(workers, queries)
            )
    for share, name in ((1.0, "all"), (0.5, "half"), (0.25, "a quarter"), (1e-9, "one piece each")):
        yield row("lease", name, Plan(300, 4_800, share=share))
    for patience in (1.2, 1.5, 2.0, 3.0, 5.0, 20.0):
        yield row("patience", f"{patience:g} times the usual", Plan(300, 600, patience=patience))
    for parts in (1, 2, 4, 8, 16):
        yield row("parts", f"{parts} parts", Plan(300, 64, parts=parts))
    for hours in (0.1, 1.0, 10.0, 100.0):
        mortal = dataclasses.replace(costs, lifetime=hours)
        yield row("lifetime", f"{hours:g} hours", Plan(300, 1_200), mortal)
    for message in (costs.message * 10, costs.message, costs.message / 10):
        other = dataclasses.replace(costs, message=message)
        yield row("head", f"{message * 1e3:.3g} ms", Plan(10_000, 20_000), other)
