"""Tables of what was measured, in Markdown.

Every ratio is that of medians of programs that took turns in one process; the number in brackets is
the ratio of the shortest times, which a busy machine disturbs least.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.measured import (
    ABSENT,
    MEBI,
    STRUCTURES,
    Entry,
    Measured,
    median,
    ratio,
    resident,
    temporary,
)
from benchmarks.models import STORAGES
from experiments import markdown

__all__ = ["TABLES"]


def text(found: tuple[float, float] | float | None) -> str:
    """A ratio for a table."""
    if found is None:
        return "-"
    if isinstance(found, tuple):
        return f"{found[0]:.2f} ({found[1]:.2f})"
    return f"{found:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is text."""
    lines = list(rows)
    return markdown.table(head, lines) if lines else f"*{ABSENT}*"


def ms(entry: Entry, name: str) -> str:
    """A program's median time."""
    if name not in entry["seconds"]:
        return "-"
    milliseconds = 1e3 * median(entry, name)
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def mebi(count: int | None) -> str:
    """Bytes as MiB."""
    return "-" if count is None else f"{count / MEBI:.1f}"


def mb(entry: Entry, name: str, which: str = "temp") -> str:
    """Bytes that a program says it needs, as MiB."""
    memory = entry["memory"][name]
    return mebi(memory and memory[which])


def over_floor(entry: Entry, name: str) -> str:
    """Measured over floor."""
    floor = entry.get("floors", {}).get(name)
    return text(median(entry, name) / floor["floor"]) if floor else "-"


def over_forward(entry: Entry, of: Callable[[Entry, str, str], Any]) -> list[str]:
    """Steps by structure of directions, over a forward pass."""
    return [text(of(entry, name, "forward")) for name in STRUCTURES]


def called(entry: Entry) -> list[str]:
    """What tables call a cell: its storage, tokens and queries."""
    cell = entry["cell"]
    layers = {True: ", scanned", False: ", unrolled", None: ""}[cell.get("scanned")]
    storage = cell["storage"] + layers + (", in turn" if cell.get("in_turn") else "")
    return [storage, f"{cell['tokens']}", f"{cell['queries']}"]


_GRID = ("storage", "tokens", "q")


def found(one: Measured) -> str:
    """What came out, in sentences: ranges over storages and structures of directions."""

    def span(values: Iterable[float | None], digits: int = 1) -> str:
        known = [f"{value:.{digits}f}" for value in values if value is not None]
        low, high = (pick(known, key=float) for pick in (min, max))
        return low if low == high else f"{low} to {high}"

    def steps(of: Callable[[Entry, str], Any], **cell: Any) -> list[Any]:
        entries = one.find("step", queries=1, scanned=True, **cell)
        return [of(entry, name) for entry in entries for name in STRUCTURES]

    def times(entry: Entry, name: str) -> float | None:
        both = ratio(entry, name, "forward")
        return both and both[0]

    lines = []
    together = {tokens: steps(times, tokens=tokens, in_turn=False) for tokens in (32, 1024)}
    if all(together.values()):
        lines.append(
            f"**A step of one query takes {span(together[32])} forward passes at 32 tokens and "
            f"{span(together[1024])} at 1,024**, all of it: draws, both sides and the update."
        )
    bytes_ = {
        (tokens, in_turn): steps(temporary, tokens=tokens, in_turn=in_turn)
        for tokens in (32, 256, 1024)
        for in_turn in (False, True)
    }
    both = [value for (_, in_turn), values in bytes_.items() if not in_turn for value in values]
    apart = bytes_[1024, True]
    if any(both) and any(apart):
        lines.append(
            f"**Its program's temporary memory is {span(both)} times a forward pass's** with both "
            f"sides together, most where activations are; {span(apart, 2)} times at 1,024 tokens "
            'with `sides="in_turn"`.'
        )
    large = one.find("memory", model="135M")
    peaks = {
        when: [resident(entry, name, when, "peak") for entry in large for name in STRUCTURES]
        for when in ("compiled", "compiling")
    }
    if all(map(any, peaks.values())):
        lines.append(
            f"**A process that trains 135 M weights of 4 bits peaks at {span(peaks['compiled'])} "
            f"times one that infers**, {span(peaks['compiling'])} times with XLA's compiler in it; "
            "the difference is programs, not a second model."
        )
    usual = one.find("baselines", tokens=32, tiny=False)
    if usual:
        against = {
            other: span([(ratio(entry, other, "rank_one") or [None])[0] for entry in usual])
            for other in ("naive", "mezo", "adam")
        }
        lines.append(
            f"**At 32 tokens a naive step takes {against['naive']} times as long as the rank-one "
            f"step**, float32 MeZO {against['mezo']} times, and Adam {against['adam']} times."
        )
    beside = one.find("beside")
    if beside:
        of_peers: dict[str, list[float | None]] = {}
        for entry in beside:
            peer = entry["cell"].get("peer", "llama.cpp")
            first, second = ("theirs", "ours") if peer == "llama.cpp" else ("ours", "theirs")
            of_peers.setdefault(peer, []).append((ratio(entry, first, second) or [None])[0])
        if of_peers.keys() == {"llama.cpp", "mezo", "lora"}:
            lines.append(
                f"**A forward pass of a Q4_1 file makes {span(of_peers['llama.cpp'])} times "
                f"llama.cpp's tokens a second**; a step takes {span(of_peers['mezo'], 2)} of the "
                f"time of MeZO's in PyTorch, and {span(of_peers['lora'])} times that of LoRA's by "
                "back-propagation."
            )
    if not lines:
        return f"*{ABSENT}*"
    verdicts = targets(one)
    met, missed = verdicts.count(_MET), verdicts.count(_MISSED)
    lines.append(
        f"**Of {met + missed} targets, one for each storage, {met} are met**: "
        "see [Targets](#targets)."
    )
    return "\n".join(f"- {line}" for line in lines)


def machine_table(one: Measured) -> str:
    """The machine and the versions."""
    here, entries = one.machine, [entry for many in one.entries.values() for entry in many]
    caches = ", ".join(f"{name} {size // 1024} KiB" for name, size in here["caches"].items())
    loads = [entry["load"] for entry in entries]
    rows = [
        ("device", f"{here['device']} x {here['devices']}"),
        ("processor", f"{here['processor']}, {here['cores']} cores; {caches or 'caches unknown'}"),
        ("memory", f"{here['memory'] / 2**30:.0f} GiB"),
        ("system", f"{here['system']}, Python {here['python']}"),
        ("versions", ", ".join(f"{name} {v}" for name, v in here["versions"].items())),
        ("commits", ", ".join(sorted({entry["commit"] for entry in entries}))),
        ("measured", " to ".join(sorted({entry["when"][:10] for entry in entries}))),
        ("load while measuring", f"{min(loads):.1f} to {max(loads):.1f}"),
    ]
    return table(("", one.backend), rows)


def step_table(one: Measured) -> str:
    """Times over a forward pass, for all of the grid."""
    rows = [
        [*called(entry), ms(entry, "forward"), *over_forward(entry, ratio)]
        for entry in one.find("step")
    ]
    return table((*_GRID, "forward, ms", *STRUCTURES.values()), rows)


def temporary_table(one: Measured) -> str:
    """Temporary bytes over those of a forward pass, for all of the grid."""
    rows = [
        [*called(entry), mb(entry, "forward"), *over_forward(entry, temporary)]
        for entry in one.find("step")
    ]
    return table((*_GRID, "forward, MiB", *STRUCTURES.values()), rows)


def floor_table(one: Measured) -> str:
    """Measured over floor, for all of the grid."""
    terms = ("memory", "products", "decoding")
    rows = [
        [
            *called(entry),
            *(f"{1e3 * entry['floors']['forward'][term]:.1f}" for term in terms),
            *(over_floor(entry, name) for name in ("forward", *STRUCTURES)),
        ]
        for entry in one.find("step")
    ]
    head = (*_GRID, "memory, ms", "products", "decoding", "forward")
    return table((*head, *STRUCTURES.values()), rows)


def rates_table(one: Measured) -> str:
    """The rates behind the floors, median over cells."""
    entries = [entry["floors"]["rates"] for entry in one.find("step")]
    if not entries:
        return f"*{ABSENT}*"
    rows = [("bandwidth, GB/s", f"{statistics.median(e['bandwidth'] for e in entries) / 1e9:.1f}")]
    tokens = sorted({int(n) for e in entries for n in e["product"]})
    for n in tokens:
        found = [e["product"][str(n)] for e in entries if str(n) in e["product"]]
        rows.append((f"product, {n} tokens, GFLOP/s", f"{statistics.median(found) / 1e9:.0f}"))
    for storage in dict.fromkeys(entry["cell"]["storage"] for entry in one.find("step")):
        found = [e["floors"]["rates"]["decode"] for e in one.find("step", storage=storage)]
        rows.append((f"decoding {storage}, G/s", f"{statistics.median(found) / 1e9:.2f}"))
    return table(("rate", "median"), rows)


def baselines_table(one: Measured) -> str:
    """Times and memory beside other ways to train."""
    rows = [
        [
            f"{name.replace('_', ' ')}, {entry['cell']['storage']}",
            f"{entry['cell']['tokens']}",
            ms(entry, name),
            *(text(ratio(entry, name, other)) for other in ("forward", "rank_one", "dense")),
            *(mb(entry, name, which) for which in ("temp", "argument")),
        ]
        for entry in one.find("baselines")
        for name in entry["seconds"]
    ]
    head = ("program", "tokens", "ms", "/ forward", "/ rank-one", "/ dense")
    return table((*head, "temporary, MiB", "arguments, MiB"), rows)


def size_table(one: Measured) -> str:
    """Growth with parameters."""
    rows = [
        [
            f"{entry['cell']['decoder']}",
            f"{entry['parameters']:,}",
            ms(entry, "forward"),
            *over_forward(entry, ratio),
            *over_forward(entry, temporary),
            *(over_floor(entry, name) for name in ("forward", "rank_one")),
        ]
        for entry in one.find("scaling", queries=ABSENT)
    ]
    names = STRUCTURES.values()
    head = ("decoder", "parameters", "forward, ms", *names, *(f"{n}, memory" for n in names))
    return table((*head, "forward / floor", "rank-one / floor"), rows)


def queries_table(one: Measured) -> str:
    """Growth with queries: the cost of an evaluation over that of one in a large batch."""
    many = "forward_as_many"
    rows = [
        [
            f"{entry['cell']['queries']}",
            *(ms(entry, name) for name in ("forward", many)),
            *(text(ratio(entry, name, many)) for name in ("together", "one_by_one", "dense")),
            text(ratio(entry, "together", "forward", 0.5 / entry["cell"]["queries"])),
            text(temporary(entry, "together", many)),
        ]
        for entry in one.find("scaling", decoder=ABSENT)
    ]
    head = ("q", "forward, ms", "forward of 2q batches, ms", "together", "one by one", "dense")
    return table((*head, "evaluation / forward", "memory, together"), rows)


def process_table(one: Measured) -> str:
    """Resident memory of processes."""
    rows = []
    for entry in one.find("memory", layers=ABSENT):
        cell = entry["cell"]
        for role, said in entry["processes"].items():
            row = [
                f"{cell['model']}, {cell['storage']}, {cell['tokens']} tokens",
                STRUCTURES.get(role, role),
                *map(mebi, (entry["stored"], said["compiled"]["empty"])),
            ]
            for when, which, _ in _RESIDENT:
                row += [mebi(said[when][which]), text(resident(entry, role, when, which))]
            rows.append([*row, mebi(said["compiled"]["device_peak"])])
    head = ("model", "process", "codes, MiB", "empty", "compiling", "/ inference")
    return table((*head, "compiled", "/ inference", "settled", "/ inference", "device"), rows)


_RESIDENT = (
    ("compiling", "peak", "peak with the compiler"),
    ("compiled", "peak", "peak, compiled before"),
    ("compiled", "settled", "settled, compiled before"),
)


def growth_table(one: Measured) -> str:
    """Temporary bytes by depth and width."""
    rows = [
        [
            f"{entry['cell']['layers']} x {entry['cell']['width']}, "
            + ("scanned" if entry["cell"]["scanned"] else "unrolled"),
            f"{entry['parameters'] / 1e6:.1f} M",
            f"{entry['largest'] / 1e6:.2f} M",
            *(mb(entry, name) for name in ("forward", *STRUCTURES)),
        ]
        for entry in one.find("memory", model=ABSENT)
    ]
    head = ("network", "parameters", "largest layer", "forward, MiB", *STRUCTURES.values())
    return table(head, rows)


def dequantization_table(one: Measured) -> str:
    """Ways to decode; the fastest of a row is bold."""
    names = ("arithmetic", "select", "gather", "pairs")
    rows = []
    for entry in one.find("dequantization"):
        cell = entry["cell"]
        fastest = min((n for n in names if n in entry["seconds"]), key=lambda n: median(entry, n))
        cells = {name: ms_fine(entry, name) for name in names}
        cells[fastest] = f"**{cells[fastest]}**"
        feeding = f"product, {cell['tokens']} tokens" if cell["tokens"] else "alone"
        without = ms_fine(entry, "product" if cell["tokens"] else "copy")
        rows.append([f"{cell['bits']} bit, {cell['dtype']}, {feeding}", without, *cells.values()])
    return table(("codes to", "without", *names), rows)


def formats_table(one: Measured) -> str:
    """Each format's forward product and step, as multiples of Q4_1's."""
    base = "Q4_1"
    rows = []
    for entry in one.find("formats"):
        for name, bits in entry["bits"].items():
            ratios = [
                text(ratio(entry, f"{name} {what}", f"{base} {what}"))
                for what in ("forward", "step")
            ]
            rows.append([name, str(entry["cell"]["tokens"]), f"{bits:.2f}", *ratios])
    head = ("format", "tokens", "bits a code", f"forward / {base}'s", f"step / {base}'s")
    return table(head, rows)


def integers_table(one: Measured) -> str:
    """Products of integers and of bfloat16 as multiples of float32's; ranges are over shapes."""
    of: dict[tuple[str, int], list[Entry]] = {}
    for entry in one.find("integers"):
        cell = entry["cell"]
        if "storage" in cell:
            of.setdefault((cell["storage"], cell["vectors"]), []).append(entry)
    rows = []
    for (storage, vectors), entries in of.items():
        row = [storage, str(vectors)]
        for name in ("integer", "bfloat16"):
            ratios = [median(entry, name) / median(entry, "float32") for entry in entries]
            errors = [entry["errors"][name] for entry in entries]
            row += [f"{min(ratios):.2f} to {max(ratios):.2f}", f"{max(errors):.1e}"]
        rows.append(row)
    head = ("codes", "vectors", "integer / float32", "error", "bfloat16 / float32", "error")
    return table(head, rows)


def integer_steps_table(one: Measured) -> str:
    """Forward passes and steps of the 12-layer network by integers, beside floats."""
    rows = []
    for entry in one.find("integers"):
        cell = entry["cell"]
        if "structure" not in cell:
            continue
        row = [STRUCTURES[cell["structure"]], str(cell["tokens"])]
        for what in ("forward", "step"):
            names = f"{what} integer", f"{what} float"
            row += [ms(entry, names[1]), ms(entry, names[0]), text(ratio(entry, *names))]
            row.append(text(temporary(entry, *names)))
        rows.append(row)
    of = ("floats, ms", "integers, ms", "ratio", "temporary bytes, ratio")
    head = (
        "directions",
        "tokens",
        *(f"{what}: {name}" for what in ("forward", "step") for name in of),
    )
    return table(head, rows)


def bfloat16_table(one: Measured) -> str:
    """Forward passes and steps of a Q4_1 file in bfloat16, beside float32."""
    rows = []
    for entry in one.find("integers"):
        cell = entry["cell"]
        if "sequences" not in cell:
            continue
        for what in ("forward", "step"):
            names = f"{what} bfloat16", f"{what} float32"
            row = [what, f"{cell['sequences']} x {cell['length']}"]
            row += [ms(entry, names[1]), ms(entry, names[0]), text(ratio(entry, *names))]
            row += [text(temporary(entry, *names)), f"{entry['error']:.4f}"]
            rows.append(row)
    head = ("", "sequences x tokens", "float32, ms", "bfloat16, ms", "ratio")
    return table((*head, "temporary bytes, ratio", "error of logits"), rows)


def integer_training_table(one: Measured) -> str:
    """Accuracies and losses of runs in each way, seed by seed."""
    rows = []
    for entry in one.find("integers"):
        cell = entry["cell"]
        if "seed" in cell:
            found = [entry[name] for name in ("float32", "integer", "bfloat16")]
            accuracies = [f"{100 * each['accuracy']:.1f}" for each in found]
            losses = [f"{each['loss']:.3f}" for each in found]
            rows.append([f"{cell['bits']} bits", str(cell["seed"]), *accuracies, *losses])
    ways = ("float32", "integer", "bfloat16")
    of = [f"{what}, {way}" for what in ("accuracy, %", "loss") for way in ways]
    return table(("codes", "seed", *of), rows)


def compiling_table(one: Measured) -> str:
    """Seconds to compile a step, beside those of two forward passes of floats."""
    rows = []
    for entry in one.find("compiling"):
        forward, step = (min(entry["seconds"][name]) for name in ("forward", "step"))
        ratio_ = f"{step / (2 * forward):.1f}"
        rows.append(
            [entry["cell"]["method"], str(entry["leaves"]), f"{forward:.2f}", f"{step:.1f}", ratio_]
        )
    head = ("directions", "matrices", "forward, s", "step, s", "step / two forward passes")
    return table(head, rows)


def beside_table(one: Measured) -> str:
    """Tokens a second and peaks of memory, ours and theirs."""
    rows = []
    for entry in one.find("beside"):
        cell = entry["cell"]
        peer = {"mezo": "MeZO, PyTorch", "lora": "LoRA by back-propagation, PyTorch"}
        what = "forward pass" if "peer" not in cell else "step"
        whose = f"{peer[cell['peer']]}, {cell['dtype']}" if "peer" in cell else "llama.cpp"
        tokens = cell["sequences"] * cell["tokens"]
        rates = [f"{tokens / median(entry, name):,.0f}" for name in ("ours", "theirs")]
        peaks = [entry["peak"][name] / MEBI for name in ("ours", "theirs")]
        rows.append(
            [
                f"{what}, {cell['sequences']} x {cell['tokens']}",
                whose,
                *rates,
                text(ratio(entry, "ours", "theirs")),
                *(f"{peak:,.0f}" for peak in peaks),
                f"{peaks[0] / peaks[1]:.2f}",
            ]
        )
    head = ("what", "beside", "tokens/s", "theirs", "time / theirs")
    return table((*head, "peak, MiB", "theirs", "peak / theirs"), rows)


def ms_fine(entry: Entry, name: str) -> str:
    """A short program's median time."""
    return f"{1e3 * median(entry, name):.2f}" if name in entry["seconds"] else "-"


def targets(one: Measured) -> str:
    """Each target by storage, met or not: judged by medians (memory: by bytes)."""
    storages = list(STORAGES)
    rows: list[list[str]] = []

    def judge(what: str, bound: float, found: dict[str, Any], *, least: bool = False) -> None:
        """Add a row, unless there is nothing to judge."""

        def verdict(storage: str) -> str:
            ratio_ = found.get(storage)
            if ratio_ is None:
                return ""
            value = ratio_[0] if isinstance(ratio_, tuple) else ratio_
            is_met = value >= bound if least else value <= bound
            return f"{text(ratio_)} {_MET if is_met else _MISSED}"

        if found:
            cells = map(verdict, storages)
            rows.append([what, f"{'>=' if least else '<='} {bound:g}", *cells])

    def by_storage(script: str, of: Callable[[Entry], Any], **cell: Any) -> dict[str, Any]:
        return {entry["cell"]["storage"]: of(entry) for entry in one.find(script, **cell)}

    few = {"tokens": 32, "queries": 1, "tiny": False}
    many = {**few, "tokens": 1024}
    together = {"scanned": True, "in_turn": False}
    layouts = {
        "": together,
        ", in turn": {**together, "in_turn": True},
        ", unrolled": {**together, "scanned": False},
    }
    for at, tokens, bounds in (
        (few, "32 tokens", {"rank_one": 1.5, "dense": 3.0}),
        (many, "1,024 tokens", dict.fromkeys(STRUCTURES, 2.1)),
    ):
        for name, bound in bounds.items():
            for layout, choices in layouts.items():
                found = by_storage(
                    "step", lambda e, n=name: ratio(e, n, "forward"), **at, **choices
                )
                judge(f"step / forward, {tokens}, {STRUCTURES[name]}{layout}", bound, found)
    alike = {"tokens": 32, "tiny": False}
    for name in ("rank_one", "dense"):
        found = by_storage("baselines", lambda e, n=name: ratio(e, "naive", n), **alike)
        judge(f"naive (dense) / our {STRUCTURES[name]} step, 32 tokens", 12.0, found, least=True)
    for name, bound in {"rank_one": 1.25, "sparse": 1.25, "dense": 2.0}.items():
        for layout, choices in layouts.items():
            found = by_storage("step", lambda e, n=name: temporary(e, n), **few, **choices)
            judge(f"temporary bytes, step / forward, {STRUCTURES[name]}{layout}", bound, found)
    for name in STRUCTURES:
        for when, which, called_ in (*_RESIDENT, ("compiled", "device_peak", "device, peak")):
            found = by_storage(
                "memory", lambda e, at=(name, when, which): resident(e, *at), model="135M"
            )
            if any(found.values()):
                what = f"resident, training / inference, 135 M, {STRUCTURES[name]}, {called_}"
                judge(what, 1.10, found)
    large = one.find("scaling", queries=64, tiny=False)
    found = {"int8": ratio(large[0], "together", "forward_as_many")} if large else {}
    judge("64 queries: an evaluation / one in a forward pass of 128 batches", 1.05, found)
    found = by_storage("baselines", lambda e: ratio(e, "rank_one", "by_hand"), **alike)
    judge("public interface / the same by hand, rank-one, 32 tokens", 1.03, found)
    return table(("target", "bound", *storages), rows)


_MET, _MISSED = "\u2713", "\u2717"


TABLES: dict[str, Callable[[Measured], str]] = {
    "found": found,
    "machine": machine_table,
    "targets": targets,
    "step": step_table,
    "temporary": temporary_table,
    "rates": rates_table,
    "floor": floor_table,
    "baselines": baselines_table,
    "size": size_table,
    "queries": queries_table,
    "processes": process_table,
    "growth": growth_table,
    "dequantization": dequantization_table,
    "formats": formats_table,
    "integers": integers_table,
    "integer_steps": integer_steps_table,
    "integer_training": integer_training_table,
    "bfloat16": bfloat16_table,
    "compiling": compiling_table,
    "beside": beside_table,
}
