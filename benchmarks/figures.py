"""Figures of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measured import (
    ABSENT,
    MEBI,
    OF_DEVICE,
    STRUCTURES,
    Entry,
    Measured,
    median,
    ratio,
    temporary,
)

__all__ = ["draw", "file_of"]

_COLORS = {"forward": "dimgray", "rank_one": "C0", "sparse": "C1", "dense": "C2"}


def file_of(name: str, one: Measured) -> str:
    """What a figure of a backend is called."""
    return f"performance_{name}{'' if one.backend == 'cpu' else '_' + one.backend}.png"


def draw(one: Measured, where: Path) -> None:
    """Draw the figures of one backend into a folder."""
    drawings = {
        "step": _draw_step,
        "scaling": _draw_scaling,
        "memory": _draw_memory,
        "device": _draw_device,
    }
    for name, drawing in drawings.items():
        if name not in one.entries:
            continue
        fig = Figure(figsize=(10.0, 4.2), layout="constrained")
        drawing(fig, one)
        where.mkdir(parents=True, exist_ok=True)
        fig.savefig(where / file_of(name, one), dpi=130)


def _draw_step(fig: Any, one: Measured) -> None:
    """Bars: time and temporary bytes of a step over those of a forward pass, one query."""
    usual = one.find("step", queries=1, scanned=True, in_turn=False)
    entries = usual or one.find("step", queries=1)
    entries.sort(key=lambda e: (e["cell"]["tokens"], e["cell"]["storage"]))
    names = [f"{e['cell']['storage']}\n{e['cell']['tokens']}" for e in entries]

    def time(entry: Entry, name: str) -> float:
        found = ratio(entry, name, "forward")
        return found[0] if found else 0.0

    def bytes_(entry: Entry, name: str) -> float:
        return temporary(entry, name) or 0.0

    for axis, of, title in zip(
        fig.subplots(1, 2),
        (time, bytes_),
        ("time of a step / forward pass", "temporary bytes of a step / forward pass"),
        strict=True,
    ):
        for i, (name, label) in enumerate(STRUCTURES.items()):
            places = [x + 0.27 * (i - 1) for x in range(len(entries))]
            axis.bar(
                places,
                [of(entry, name) for entry in entries],
                0.25,
                label=label,
                color=_COLORS[name],
            )
        axis.axhline(1.0 if of is bytes_ else 2.0, color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(entries)), names, fontsize=7)
        axis.set_xlabel("storage and tokens")
        axis.set_title(title, fontsize=10)
        axis.grid(axis="y", alpha=0.3)
    fig.axes[0].legend(frameon=False, fontsize=8)


def _draw_scaling(fig: Any, one: Measured) -> None:
    """Lines: times by parameters, with the floor, and times by queries."""
    left, right = fig.subplots(1, 2)
    sizes = sorted(one.find("scaling", queries=ABSENT), key=lambda e: e["parameters"])
    weights = [e["parameters"] for e in sizes]
    for name, label in {"forward": "forward", **STRUCTURES}.items():
        times, color = [1e3 * median(e, name) for e in sizes], _COLORS[name]
        left.plot(weights, times, "o-", label=label, color=color)
        floors = [1e3 * e["floors"][name]["floor"] for e in sizes]
        left.plot(weights, floors, ":", color=color)
    left.set_title("a decoder, 4-bit, 32 tokens (dotted: the floor)", fontsize=10)
    left.set_xlabel("parameters")
    by_queries = sorted(one.find("scaling", decoder=ABSENT), key=lambda e: e["cell"]["queries"])
    queries = [e["cell"]["queries"] for e in by_queries]
    for name, label in {
        "forward_as_many": "forward pass of 2q batches",
        "together": "rank-one, together",
        "one_by_one": "rank-one, one by one",
        "dense": "dense, one by one",
    }.items():
        right.plot(queries, [1e3 * median(e, name) for e in by_queries], "o-", label=label)
    right.set_title("the 21 M network, int8, 32 tokens", fontsize=10)
    right.set_xlabel("queries q")
    for axis in (left, right):
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3)
        if axis.lines and len(axis.lines[0].get_xdata()):
            axis.set_xscale("log", base=10 if axis is left else 2)
            axis.set_yscale("log")
        axis.legend(frameon=False, fontsize=8)


def _draw_memory(fig: Any, one: Measured) -> None:
    """Temporary bytes by depth and by width; resident memory of processes."""
    left, middle, right = fig.subplots(1, 3)
    growth = [e for e in one.find("memory", model=ABSENT) if e["cell"]["scanned"]]
    for axis, fixed, other in ((left, "width", "layers"), (middle, "layers", "width")):
        values = [e["cell"][fixed] for e in growth]
        usual = max(set(values), key=values.count) if values else None
        if fixed == "layers":
            usual = 12 if 12 in values else usual
        chosen = sorted(
            (e for e in growth if e["cell"][fixed] == usual), key=lambda e: e["cell"][other]
        )
        for name, label in {"forward": "forward", **STRUCTURES}.items():
            points = [(e["cell"][other], e["memory"][name]) for e in chosen]
            known = [(x, memory["temp"] / MEBI) for x, memory in points if memory]
            axis.plot(
                [x for x, _ in known], [y for _, y in known], "o-", label=label, color=_COLORS[name]
            )
        axis.set_xlabel(f"{other} ({usual} {fixed})" if fixed == "layers" else f"{other}")
        axis.set_ylabel("temporary MiB")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    left.set_title("temporary memory by depth", fontsize=10)
    middle.set_title("and by width", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for entry in one.find("memory", model="135M") or one.find("memory", layers=ABSENT)[:1]:
        roles = list(entry["processes"])
        for which, when, label in (
            ("peak", "compiling", "compiler included"),
            ("peak", "compiled", "compiled before"),
            ("empty", "compiled", "an empty process"),
        ):
            sizes = [(entry["processes"][role][when][which] or 0) / MEBI for role in roles]
            right.bar(range(len(roles)), sizes, label=label)
        names = [STRUCTURES.get(role, role) for role in roles]
        right.set_xticks(range(len(roles)), names, rotation=60, fontsize=8)
        right.set_title(f"resident MiB, {entry['cell']['model']}", fontsize=10)
        right.legend(frameon=False, fontsize=8)


def _draw_device(fig: Any, one: Measured) -> None:
    """Bars: steps over forward passes, and bytes of codes a second over those of a copy."""
    entries = one.find("device", queries=1)
    names = ["\n".join(str(e["cell"][k]) for k in ("model", "storage", "tokens")) for e in entries]

    def share(entry: Entry, name: str) -> tuple[float, float] | None:
        """A step reads codes and scales twice at least: for its products, and for the update."""
        if name not in entry["seconds"]:
            return None
        read = (1 if name == "forward" else 2) * sum(entry["bytes"].values())
        seconds = median(entry, name), min(entry["seconds"][name])
        return tuple(read / s / entry["bandwidth"] for s in seconds)

    left, right = fig.subplots(1, 2)
    bars = {"forward": "forward", **OF_DEVICE}
    for axis, of in ((left, lambda entry, name: ratio(entry, name, "forward")), (right, share)):
        for i, (name, label) in enumerate(bars.items()):
            found = [(x + 0.17 * (i - 2), of(entry, name)) for x, entry in enumerate(entries)]
            places = [x for x, both in found if both]
            axis.bar(
                places, [both[0] for _, both in found if both], 0.16, label=label, color=f"C{i}"
            )
        axis.set_xticks(range(len(entries)), names, fontsize=6)
        axis.set_xlabel("model, storage and tokens")
        axis.grid(axis="y", alpha=0.3)
    left.axhline(2.0, color="black", linewidth=0.8, linestyle=":")
    left.set_title("time / forward pass, one query", fontsize=10)
    right.set_title("codes and scales read a second / bytes of a copy", fontsize=10)
    right.legend(frameon=False, fontsize=8)
