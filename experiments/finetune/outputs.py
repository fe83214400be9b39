"""What a run leaves behind: the trained file, the log that rebuilds it, a report with curves."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments import footprint, markdown
from experiments.files import write_json, write_text
from experiments.finetune import seed_log
from experiments.finetune.config import Config
from experiments.finetune.models.loading import Checkpoint, module_names
from experiments.finetune.models.stacks import place_of, unstack
from experiments.finetune.training import Outcome
from zoqo_jax.grids.arrays import is_trained
from zoqo_jax.implicit.lora import is_lora
from zoqo_jax.interop import safetensors

__all__ = ["write", "write_trained"]


def write(config: Config, outcome: Outcome, seconds: float) -> list[Path]:
    """Write the trained codes or adapter, the seed log, and the report.

    Returns:
      The files, the most wanted first.
    """
    folder = Path(config.output)
    trained = write_trained(folder, config, outcome.model, outcome.params)
    written = [trained]
    if not (config.moves_floats or config.guide_every):  # guides are of the data
        seed_log.save(folder / "replay.npz", config, outcome.model, outcome.log)
        written.append(folder / "replay.npz")
    _draw(outcome, folder / "curves.png")
    write_json(folder / "outcome.json", _in_figures(config, outcome, seconds))
    report = folder / "report.md"
    write_text(report, _report(config, outcome, seconds, trained.name))
    return [*written, report]


def write_trained(folder: Path, config: Config, model: Checkpoint, params: Any) -> Path:
    """Write trained parameters as other programs read them.

    Args:
      folder: where to.
      config: the run's settings.
      model: what was trained, the whole model or its last layers.
      params: its trained parameters.

    Returns:
      A GGUF file or a folder, as the model was one; or that of an adapter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if config.train != "lora":
        return _write_model(folder, model, params)
    _write_adapter(folder / "adapter", model, config, params)
    return folder / "adapter"


def _write_model(folder: Path, checkpoint: Checkpoint, params: Any) -> Path:
    """The same kind of checkpoint as the one that was read, with trained codes or scales."""
    source = checkpoint.path
    model = zq.load(source, tokenizer=False)
    trained = folder / ("model.gguf" if source.is_file() else "model")
    zq.save(trained, _put_back(model.tensors, checkpoint, params), model)
    return trained


def _put_back(tensors: dict[str, Any], checkpoint: Checkpoint, params: Any) -> dict[str, Any]:
    """A file's tensors that were trained, with the trained codes and scales, by their names."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=zq.is_quantized):
        if not is_trained(leaf):
            continue
        places = checkpoint.places_of("/".join(str(key.key) for key in path))
        for (_, place), layer in zip(places, unstack(leaf), strict=True):
            moved = {"packed": layer.packed, "scale": layer.scale}
            found[place] = dataclasses.replace(tensors[place], **moved)
    return found


def _write_adapter(folder: Path, checkpoint: Checkpoint, config: Config, params: Any) -> None:
    """An adapter as PEFT reads it, in float32."""
    folder.mkdir(exist_ok=True)
    tensors, targets, modules = {}, set(), module_names(checkpoint)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_lora):
        if not is_lora(leaf):
            continue
        keys = "/".join(key.key for key in path)
        place, numbers = place_of(keys, checkpoint.span, checkpoint.types)
        name = place.removesuffix("/weight")
        module = modules[name]
        targets.add(module.rpartition(".")[2])
        a, b, *core = map(zq.dequantize, leaf.arrays[1:])
        for factor, kind in ((jnp.matmul(*core, a) if core else a, "A"), (b, "B")):
            layers = np.asarray(factor)
            for number, layer in zip(numbers, layers, strict=True):
                place = f"base_model.model.{module.format(number)}.lora_{kind}.weight"
                tensors[place] = _half_split(layer, name, kind, checkpoint)
    safetensors.save(folder / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.metadata.get("general.name", ""),
        "r": config.core or config.rank,
        "lora_alpha": config.core or config.alpha,  # a core's bases have their scale
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    if len(checkpoint.span) < checkpoint.architecture.depth:
        settings["layers_to_transform"] = list(checkpoint.span)
    write_json(folder / "adapter_config.json", settings)


def _half_split(layer: np.ndarray, name: str, kind: str, checkpoint: Checkpoint) -> np.ndarray:
    """B of queries and keys, its rows in Hugging Face's order: neighbours become halves."""
    arch = checkpoint.architecture
    if kind == "A" or name not in ("q", "k") or arch.positions != "pairs":
        return layer
    pairs = layer.reshape(-1, arch.head_width // 2, 2, layer.shape[-1])
    return pairs.swapaxes(1, 2).reshape(layer.shape)


def _report(config: Config, outcome: Outcome, seconds: float, trained: str) -> str:
    rows = [
        [when, f"{scores.accuracy:.1%}", f"{scores.loss:.3f}"]
        for when, scores in (("before", outcome.before), ("after", outcome.after))
    ]
    table = markdown.table(["test examples", "accuracy", "loss"], rows)
    looks = markdown.table(
        ["step", "forward passes", "loss", "dev loss", "dev accuracy"],
        [
            [
                str(line["step"]),
                f"{line['forward_passes']:,}",
                f"{line['loss']:.3f}",
                f"{line['dev_loss']:.3f}",
                f"{line['dev_accuracy']:.1%}",
            ]
            for line in outcome.history
        ],
    )
    if outcome.dev_before is not None:
        start = outcome.dev_before
        looks += f"\n\nBefore training: dev loss {start.loss:.3f}, accuracy {start.accuracy:.1%}."
    settings = json.dumps(_used(config, outcome), indent=1)
    return f"""# {config.name}

{table}

Step {outcome.best_step} answered the dev examples best (by accuracy, then by loss); `{trained}` is
what it left.
{"".join(f"{chr(10)}{remark}{chr(10)}" for remark in outcome.remarks)}{_examples(outcome)}
{seconds:.0f} seconds in all, {footprint.peak():.0f} MiB resident at most.

![loss and dev accuracy](curves.png)

{looks}

```json
{settings}
```
"""


def _in_figures(config: Config, outcome: Outcome, seconds: float) -> dict[str, Any]:
    """What a run came to, for other programs."""
    scores = {
        when: {"accuracy": one.accuracy, "loss": one.loss}
        for when, one in (("before", outcome.before), ("after", outcome.after))
    }
    spent = {"forward_passes": outcome.forward_passes, "seconds": seconds}
    scores["settings"] = _used(config, outcome)
    if outcome.dev_before is not None:
        before = outcome.dev_before
        scores["dev_before"] = {"accuracy": before.accuracy, "loss": before.loss}
    found = {**scores, "best_step": outcome.best_step, **spent, "resident_mib": footprint.peak()}
    return {**found, "remarks": outcome.remarks, "history": outcome.history}


def _used(config: Config, outcome: Outcome) -> dict[str, Any]:
    """The settings as the run used them."""
    count = {f"{part}_examples": n for part, n in outcome.examples.items() if part != "train"}
    return {**config.used, "layers": len(outcome.model.span), **count}


def _examples(outcome: Outcome, count: int = 4) -> str:
    """Test sentences whose answer changed, and some whose answer is still wrong, as a table."""
    texts, before, after = outcome.test, outcome.before.said, outcome.after.said
    groups = texts.compared(before, after)
    rows = [
        [
            *map(_cell, (texts.prompts[i], texts.of(i)[before[i]], texts.of(i)[after[i]])),
            name,
        ]
        for name, places in groups.items()
        for i in places[:count]
    ]
    if not rows:
        return ""
    counts = ", ".join(f"{len(places)} {name}" for name, places in groups.items())
    head = ["prompt", "before", "after", ""]
    return f"\nOf {len(after)} test examples: {counts}.\n\n{markdown.table(head, rows)}\n"


def _cell(text: str) -> str:
    """A text as a cell of a table, which has one line."""
    return text.replace("|", "\\|").replace("\r", "").replace("\n", "<br>")


def _draw(outcome: Outcome, path: Path) -> None:
    """Losses and accuracies of the dev examples against forward passes."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    passes = [line["forward_passes"] for line in outcome.history]
    for name, label in (("loss", "batch"), ("dev_loss", "dev examples")):
        left.plot(passes, [line[name] for line in outcome.history], "o-", ms=3, label=label)
    left.set_ylabel("loss, nats")
    left.legend(frameon=False)
    right.plot(passes, [100 * line["dev_accuracy"] for line in outcome.history], "o-", ms=3)
    right.set_ylabel("dev accuracy, %")
    _mark(right, outcome.history, outcome.best_step)
    for axis in (left, right):
        axis.set_xlabel("forward passes of a batch")
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=150)


def _mark(axis: Any, history: Sequence[dict[str, float]], best_step: int) -> None:
    """Draw a ring round the best step."""
    for line in history:
        if line["step"] == best_step:
            at = line["forward_passes"], 100 * line["dev_accuracy"]
            axis.plot(*at, "o", ms=9, mfc="none", mec="C3")
