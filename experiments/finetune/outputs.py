"""What a run leaves behind: the trained file, the log that rebuilds it, a report with curves."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import zoqo_jax as zq
from experiments import markdown
from experiments.finetune.config import Config
from experiments.finetune.models.loading import MODULES, Checkpoint, unstack
from experiments.finetune.training import Outcome
from zoqo_jax.arrays import is_trained
from zoqo_jax.interop import bitsandbytes, gguf, safetensors
from zoqo_jax.lora import is_lora

__all__ = ["write"]


def write(checkpoint: Checkpoint, config: Config, outcome: Outcome, seconds: float) -> list[Path]:
    """Write the trained codes or adapter, the seed log, and the report.

    Returns:
      The files, the most wanted first.
    """
    folder = Path(config.output)
    if config.train == "codes":
        trained = _write_codes(folder, checkpoint, config, outcome.params)
    else:
        trained = folder / "adapter"
        _write_adapter(trained, checkpoint, config, outcome.params)
    written = [trained]
    if not config.moves_floats:
        np.savez_compressed(folder / "replay.npz", log=outcome.log)
        written.append(folder / "replay.npz")
    _draw(outcome, folder / "curves.png")
    report = folder / "report.md"
    report.write_text(_report(config, outcome, seconds, trained.name))
    return [*written, report]


def _write_codes(folder: Path, checkpoint: Checkpoint, config: Config, params: Any) -> Path:
    """The same kind of checkpoint as the one that was read, with trained codes."""
    tensors = tensors_of(checkpoint, params)
    if checkpoint.companions is None:
        gguf.save(folder / "model.gguf", tensors, checkpoint.metadata)
        return folder / "model.gguf"
    trained = folder / "model"
    trained.mkdir(exist_ok=True)
    bitsandbytes.save(trained / "model.safetensors", tensors, checkpoint.companions)
    for settings in Path(config.model).glob("*.json"):
        if not settings.name.endswith(".index.json"):  # one file needs no index of shards
            shutil.copy(settings, trained)
    return trained


def tensors_of(checkpoint: Checkpoint, params: Any) -> dict[str, Any]:
    """The file's tensors, by their names there and in their order, with trained codes in place."""
    found = dict(checkpoint.tensors)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=zq.is_quantized):
        if not is_trained(leaf):
            continue
        name = checkpoint.names["/".join(str(key.key) for key in path)]
        layers = unstack(leaf) if "{}" in name else [leaf]
        for number, layer in enumerate(layers):
            old = found[name.format(number)]
            found[name.format(number)] = old.moved(layer.codes)
    return found


def _write_adapter(folder: Path, checkpoint: Checkpoint, config: Config, params: Any) -> None:
    """An adapter as PEFT reads it, in float32."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name, module in MODULES.items():
        leaf = params["layers"].get(name, {}).get("weight")
        if not is_lora(leaf):
            continue
        for factor, kind in ((leaf.a, "A"), (leaf.b, "B")):
            for number, layer in enumerate(np.asarray(zq.dequantize(factor))):
                place = f"base_model.model.model.layers.{number}.{module}.lora_{kind}.weight"
                tensors[place] = _half_split(layer, name, kind, checkpoint)
    safetensors.save(folder / "adapter_model.safetensors", tensors)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": checkpoint.metadata.get("general.name", ""),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(MODULES[name].split(".")[1] for name in config.matrices),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1))


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
    last = outcome.history[-1] if outcome.history else {}
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
    settings = json.dumps({k: v for k, v in vars(config).items() if k != "output"}, indent=1)
    return f"""# {config.name}

{table}

The best step by dev accuracy was {outcome.best_step}; `{trained}` is what it left.
{seconds:.0f} seconds in all, {last.get("resident_mb", 0):.0f} MiB resident at most.

![loss and dev accuracy](curves.png)

{looks}

```json
{settings}
```
"""


def _draw(outcome: Outcome, path: Path) -> None:
    """Losses and accuracies of the dev examples against forward passes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(fig)
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
    """A ring round the step that was kept."""
    for line in history:
        if line["step"] == best_step:
            at = line["forward_passes"], 100 * line["dev_accuracy"]
            axis.plot(*at, "o", ms=9, mfc="none", mec="C3")
