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
    KERNEL,
    MEBI,
    OF_DEVICE,
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

__all__ = ["NOTHING", "TABLES"]

NOTHING = f"*{ABSENT}*"


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
    return markdown.table(head, lines) if lines else NOTHING


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


def advice(one: Measured) -> str:
    """Ten lines that a user can act on; one whose figures were not measured is left out.

    Ranges go over storages, and over structures of directions where none is named.
    """
    rooms = (_of_steps, _of_queries, _of_types, _of_programs, _of_files, _of_others)
    lines = [line for room in rooms for line in room(one)]
    if not lines:
        return NOTHING
    verdicts = targets(one)
    met, missed = verdicts.count(_MET), verdicts.count(_MISSED)
    numbered = "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))
    return (
        f"{numbered}\n\nOf {met + missed} [targets](#targets) for all this, one for each storage, "
        f"{met} are met."
    )


def _span(values: Iterable[float | None], digits: int = 1) -> str:
    """The least and the greatest of what is known, or "" of nothing."""
    known = [f"{value:.{digits}f}" for value in values if value is not None]
    if not known:
        return ""
    low, high = (pick(known, key=float) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def _over(
    entries: Iterable[Entry], above: str | Iterable[str], below: str = "forward", digits: int = 1
) -> str:
    """What programs take over another, by medians."""
    names = (above,) if isinstance(above, str) else tuple(above)
    ratios = (ratio(entry, name, below) for entry in entries for name in names)
    return _span((both and both[0] for both in ratios), digits)


def _of_steps(one: Measured) -> Iterable[str]:
    """What a step of one query costs, by tokens, sides and structure."""
    usual = one.find("baselines", tokens=32, tiny=False)
    if usual:
        naive, mezo, adam = (_over(usual, name, "rank_one") for name in ("naive", "mezo", "adam"))
        yield (
            "**Compile `tx.update` and `optax.apply_updates` as one function, parameters and state "
            "donated**: codes are then written over, and nothing is copied. A step that makes "
            f"displaced copies of the model takes {naive} times as long as a rank-one step at 32 "
            f"tokens, float32 MeZO {mezo} times, Adam {adam} times."
        )

    def steps(tokens: int, **cell: Any) -> list[Entry]:
        return one.find("step", queries=1, scanned=True, tokens=tokens, **cell)

    def bytes_(entries: list[Entry]) -> str:
        return _span([temporary(e, name) for e in entries for name in STRUCTURES], 2)

    few, many = (steps(tokens, in_turn=False) for tokens in (32, 1024))
    if few and many:
        yield (
            f"**Fill the batch**: a step of one query takes {_over(few, STRUCTURES)} forward "
            f"passes at 32 tokens and {_over(many, STRUCTURES)} at 1,024, draws and update "
            "included."
        )
    in_turn = steps(1024, in_turn=True)
    if many and in_turn:
        yield (
            '**Where activations take the memory, say `sides="in_turn"`**: temporary memory is '
            f"{bytes_(in_turn)} times a forward pass's at 1,024 tokens, {bytes_(many)} with both "
            f"sides together, and a step takes {_over(in_turn, STRUCTURES)} forward passes."
        )
    if few:
        yield (
            '**At few tokens, say `structure="rank_one"`**: '
            f"{_over(few, 'rank_one')} forward passes at 32, where sparse directions take "
            f"{_over(few, 'sparse')} and dense ones {_over(few, 'dense')}; least on a uniform grid "
            "with one scale a matrix."
        )


def _of_queries(one: Measured) -> Iterable[str]:
    """What queries that are evaluated together save."""
    queries = [e for e in one.find("scaling", decoder=ABSENT) if e["cell"]["queries"] == 16]
    for entry in queries:
        together, apart = (
            ratio(entry, name, "forward", 1 / 32) for name in ("together", "one_by_one")
        )
        if together and apart:
            yield (
                "**Ask many queries at once, `query_batch=None`, where memory allows**: one of 32 "
                f"evaluations of 16 rank-one queries takes {together[0]:.2f} of a forward pass by "
                f"itself, and {apart[0]:.2f} where queries take turns (int8, 32 tokens)."
            )


def _of_types(one: Measured) -> Iterable[str]:
    """What is saved by integers and bfloat16, of a network's steps and of a file's."""
    rows = [entry for entry in one.find("integers") if "structure" in entry["cell"]]
    files = [entry for entry in one.find("integers") if "sequences" in entry["cell"]]
    if rows and files:
        forward, step = (
            _over(rows, f"{what} integer", f"{what} float", 2) for what in ("forward", "step")
        )
        of_file = _over(files, "step bfloat16", "step float32", 2)
        yield (
            '**With a scale a matrix or a row, try `zq.with_products(params, "integer")`, else '
            "bfloat16**, [where the processor has them](#products-of-integers-and-bfloat16): of "
            f"8-bit codes a forward pass takes {forward} of the time of floats, a step {step}; a "
            f"step on a Q4_1 file takes {of_file} in bfloat16."
        )


def _of_programs(one: Measured) -> Iterable[str]:
    """What compiling costs, in time and in memory."""
    compiled = one.find("compiling")
    if compiled:
        seconds = _span((min(entry["seconds"]["step"]) for entry in compiled), 0)
        yield (
            "**Scan layers that are alike, and keep JAX's compilation cache**: a step on "
            f"{compiled[0]['leaves']} matrices of their own takes {seconds} s of processor to "
            "compile, layers that are scanned are compiled once, and what is in the cache is not."
        )
    peaks = {
        when: _span(
            resident(entry, name, when, "peak")
            for entry in one.find("memory", model="135M")
            for name in STRUCTURES
        )
        for when in ("compiled", "compiling")
    }
    if all(peaks.values()):
        yield (
            "**Where the memory of the process counts, compile in another one before**: one that "
            f"trains 135 M weights of 4 bits then peaks at {peaks['compiled']} times one that "
            f"infers, and at {peaks['compiling']} times with XLA's compiler in it."
        )


def _of_files(one: Measured) -> Iterable[str]:
    """What formats of files cost beside Q4_1."""
    few = one.find("formats", tokens=32)
    if few:
        of = {
            name: _over(few, f"{name} step", "Q4_1 step", 2)
            for name in ("Q8_0", "Q4_K", "Q5_0", "Q6_K")
        }
        yield (
            "**Of files of one model, take Q4_K or Q8_0 to train**: a step on a matrix takes "
            f"{of['Q4_K']} and {of['Q8_0']} of the time that it takes in Q4_1, in Q5_0 and Q6_K "
            f"{of['Q5_0']} and {of['Q6_K']} (32 tokens)."
        )


def _of_others(one: Measured) -> Iterable[str]:
    """What a user would run instead."""
    peers: dict[str, list[Entry]] = {}
    for entry in one.find("beside"):
        peers.setdefault(entry["cell"].get("peer", "llama.cpp"), []).append(entry)
    if peers.keys() == {"llama.cpp", "mezo", "lora"}:
        forward = _over(peers["llama.cpp"], "theirs", "ours")
        mezo, lora = (_over(peers[name], "ours", "theirs", 2) for name in ("mezo", "lora"))
        yield (
            f"**Compare with what you run now**: a forward pass of a Q4_1 file makes {forward} "
            f"times llama.cpp's tokens a second; a step takes {mezo} of the time of MeZO's in "
            f"PyTorch, and {lora} times that of LoRA's by back-propagation, which has a gradient "
            "for it."
        )


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
        return NOTHING
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


def _in_place_of(entry: Entry, new: str, old: str) -> list[str]:
    """Times of a program and of one in its place, and the ratios of time and temporary memory."""
    ratios = ratio(entry, new, old), temporary(entry, new, old)
    return [ms(entry, old), ms(entry, new), *map(text, ratios)]


def integer_steps_table(one: Measured) -> str:
    """Forward passes and steps of the 12-layer network by integers, beside floats."""
    rows = []
    for entry in one.find("integers"):
        cell = entry["cell"]
        if "structure" not in cell:
            continue
        row = [STRUCTURES[cell["structure"]], str(cell["tokens"])]
        for what in ("forward", "step"):
            row += _in_place_of(entry, f"{what} integer", f"{what} float")
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
            row = [what, f"{cell['sequences']} x {cell['length']}"]
            row += _in_place_of(entry, f"{what} bfloat16", f"{what} float32")
            rows.append([*row, f"{entry['error']:.4f}"])
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


def device_table(one: Measured) -> str:
    """Times on a device, and bytes of codes and scales that a forward pass reads in a second."""
    rows = []
    for entry in one.find("device", queries=1):
        cell, codes = entry["cell"], sum(entry["bytes"].values())
        read = codes / median(entry, "forward")
        rows.append(
            [
                f"{cell['model']}, {cell['storage']}",
                f"{cell['tokens']}",
                ms_fine(entry, "forward"),
                f"{read / 1e9:,.0f}",
                f"{read / entry['bandwidth']:.2f}",
                *(
                    f"{ms_fine(entry, name)}, {text(ratio(entry, name, 'forward'))}"
                    if name in entry["seconds"]
                    else "-"
                    for name in OF_DEVICE
                ),
            ]
        )
    head = ("model", "tokens", "forward, ms", "codes, GB/s", "/ copy's")
    return table((*head, *(f"{label}, ms, / forward" for label in OF_DEVICE.values())), rows)


def device_queries_table(one: Measured) -> str:
    """A rank-one step of many queries beside one forward pass with as many batches."""
    many = "forward_as_many"
    rows = [
        [
            f"{entry['cell']['model']}, {entry['cell']['storage']}",
            f"{entry['cell']['queries']}",
            *(ms_fine(entry, name) for name in ("forward", many, "rank_one", KERNEL)),
            *(text(ratio(entry, name, many)) for name in ("rank_one", KERNEL)),
        ]
        for entry in one.find("device")
        if entry["cell"]["queries"] > 1
    ]
    head = ("model", "q", "forward, ms", "of 2q batches", "rank-one", "rank-one, kernel")
    return table((*head, "rank-one / 2q batches", "kernel / 2q batches"), rows)


def exactness_table(one: Measured) -> str:
    """Of each kind of check, how many were within their bound, and the worst of them."""
    kinds: dict[str, list[Entry]] = {}
    for entry in one.find("exactness"):
        cell = entry["cell"]
        kind = cell.get("what") or ("kernel" if "array" in cell else "codes")
        kinds.setdefault(kind + (", kernel" if cell.get("kernels") else ""), []).append(entry)
    rows = []
    for kind, entries in kinds.items():
        worst = max(entries, key=lambda e: e["error"] / max(e["at_most"], 1e-30))
        errors = [f"{worst['error']:.1e}", f"{worst['at_most']:.1e}"]
        rows.append(
            [kind, f"{len(entries)}", *(errors if worst["at_most"] else ["equal", "equal"])]
        )
    return table(("checks", "passed", "worst error", "at most"), rows)


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
    "advice": advice,
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
    "device": device_table,
    "device_queries": device_queries_table,
    "exactness": exactness_table,
}
