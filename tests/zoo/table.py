"""The table of docs/models.md."""

from collections.abc import Mapping
from typing import Any

from experiments import markdown
from zoo.registry import Model

__all__ = ["EMPTY", "filled"]

EMPTY = "<!-- table: models -->\n<!-- end -->\n"
_HEAD = (
    "model", "package", "implicit", "arrays of floats", "dense", "rank-one", "compile, s", "fails",
)  # fmt: skip


def filled(document: str, models: Mapping[str, Model], found: Mapping[str, Any]) -> str:
    """The document with the table of what was found between its two markers."""
    rows = [_row(models[name], found[name]) for name in models if name in found]
    passed = sum(not report["failures"] for name, report in found.items() if name in models)
    packages = {models[name].package for name in models if name in found}
    traced = sum(report["depth"] == "traced" for report in found.values())
    text = f"{passed} of {len(rows)} models of {len(packages)} packages pass"
    text += f"; {traced} of the {len(rows)} were traced, and not run.\n\n" if traced else ".\n\n"
    text += markdown.table(_HEAD, rows)
    return markdown.filled(document, lambda name: text if name == "models" else None)


def _row(model: Model, report: Mapping[str, Any]) -> list[str]:
    share, ratio = report.get("share"), report.get("ratio", {})
    compiling = report.get("compile_seconds", {}) if report.get("depth") == "timed" else {}
    names = ("forward", "dense", "rank_one")
    return [
        model.about,
        f"{model.package} {report.get('version', '')}".strip(),
        "" if share is None else f"{100 * share:.0f} %",
        ", ".join(f"{n} {name}" for name, n in report.get("fallbacks", {}).items()),
        *(f"{ratio[name]:.2f}" if name in ratio else "" for name in names[1:]),
        " / ".join(f"{compiling[name]:.1f}" if name in compiling else "–" for name in names),
        _failures(report["failures"]),
    ]


def _failures(failures: Mapping[str, str]) -> str:
    """Each message once, with all that failed so."""
    by_message: dict[str, list[str]] = {}
    for what, message in failures.items():
        by_message.setdefault(message[:160], []).append(what)
    text = "; ".join(f"{', '.join(what)}: {message}" for message, what in by_message.items())
    return text.replace("|", "\\|").replace("<", "&lt;")
