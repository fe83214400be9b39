"""The loop of a fine-tuning run: steps, looks at the dev examples, checkpoints, and going on.

All that a run depends on is its configuration and the number of the step, so that a run which was
killed goes on from its last checkpoint bit for bit. What trains is a few arrays, the bytes of
codes or floats; everything else is read from the model's file again.
"""

import dataclasses
import functools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter
from tqdm import tqdm

import zoqo_jax as zq
from experiments.finetune import data, objective, states
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from experiments.finetune.models.loading import Checkpoint
from zoqo_jax.arrays import is_trained
from zoqo_jax.interop.files import replacing
from zoqo_jax.lora import is_factor

__all__ = ["Outcome", "adapt", "train", "transformation"]


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      model: what was trained, the whole model or its last layers.
      params: its trained parameters, at the step that answered the dev examples best.
      best_step: that step.
      log: differences of losses of the steps up to it, float32 (steps, queries); see `zq.replay`.
      before: scores on the test examples before the run.
      after: and at `best_step`.
      history: what was measured on the way, a dictionary for each look at the dev examples.
      test: the test examples.
    """

    model: Checkpoint
    params: Any
    best_step: int
    log: np.ndarray
    before: objective.Scores
    after: objective.Scores
    history: list[dict[str, float]]
    test: data.Texts


def adapt(checkpoint: Checkpoint, config: Config) -> Any:
    """A model's parameters, ready to be trained: all but what trains frozen.

    Raises:
      ValueError: there is nothing to train.
    """
    params = checkpoint.params

    def is_chosen(path: tuple[Any, ...], leaf: Any) -> bool:
        keys = [getattr(key, "key", None) for key in path]
        return keys[0] == "layers" and keys[1] in config.matrices and keys[-1] == "weight"

    if config.train == "scales" and checkpoint.path.is_dir():
        raise ValueError(f"train='scales' needs a GGUF file, got the folder {checkpoint.path}.")
    if config.train != "lora":
        params = zq.freeze(params, lambda path, leaf: not is_chosen(path, leaf))
        if not any(map(is_trained, jax.tree.leaves(params, is_leaf=zq.is_quantized))):
            raise ValueError(f"model: {config.model} has no codes in {', '.join(config.matrices)}.")
        return params
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    grid = zq.companders.nf4() if config.grid == "nf4" else zq.companders.identity()
    quantizer = zq.Quantizer(config.bits, compander=grid, range=config.range)
    quantizer = None if config.moves_floats else quantizer
    settings = {"key": key, "where": is_chosen, "quantizer": quantizer}
    return zq.lora(params, config.rank, config.alpha, **settings)


def transformation(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run."""
    key = jax.random.key(config.seed)

    def falling(start: float) -> Callable[[Any], jax.Array]:
        return optax.exponential_decay(start, config.steps, config.decay)

    queries = {"num_queries": config.num_queries, "query_batch": config.query_batch, "key": key}
    sparse = config.is_sparse
    structure = {"auto": "sparse" if sparse else "dense"}.get(config.structure, config.structure)
    density = {"density": falling(config.density)} if sparse else {}
    shape = {"structure": structure, **density, **queries}
    if config.method == "zoqo":
        # In place a step is one code, and the density is what falls.
        in_place = config.train == "codes"
        rate = config.learning_rate or (1e-9 if in_place else 2e-3)
        return zq.zoqo(
            rate if sparse else falling(rate),
            config.radius or (1e-9 if in_place else 2e-3),
            noise=config.noise,
            step=config.step_rule,
            **shape,
        )
    if config.method == "caq_zo":
        radius = (config.radius or 0.1) if config.query == "off_grid" else None
        asked = {"query": config.query, "radius": radius, "boundary": "clamp"}
        return zq.caq_zo(falling(config.learning_rate or 1.0), **asked, **shape)
    if config.method in ("quzo", "qes"):
        rule = zq.quzo if config.method == "quzo" else zq.qes
        return rule(falling(config.learning_rate or 1.0), config.radius or 1.0, **shape)
    if config.method == "qzo":
        return zq.qzo(falling(config.learning_rate or 1e-7), config.radius or 1e-4, **queries)
    if config.method == "adam":
        return optax.with_extra_args_support(optax.adam(falling(config.learning_rate or 1e-3)))
    rate = falling(config.learning_rate or (1e-3 if config.method == "zo_signsgd" else 1e-2))
    rule = optax.sign_sgd if config.method == "zo_signsgd" else optax.sgd
    return optax.chain(zq.spsa(config.radius or 2e-3, **queries), rule(rate))


def train(checkpoint: Checkpoint, config: Config, *, progress: bool = True) -> Outcome:
    """Fine-tune a model, or go on where an interrupted run of these settings stopped.

    Args:
      checkpoint: the model.
      config: the settings.
      progress: whether to show a progress bar.

    Raises:
      ValueError: data, model and settings that do not fit each other.
    """
    run = _Run(checkpoint, config, progress)
    return run.outcome()


class _Progress(NamedTuple):
    """Where a run is: what a checkpoint holds."""

    step: int
    trained: list[jax.Array]  # the arrays that change
    state: Any  # the optimizer's
    best: list[np.ndarray]  # `trained` at `best_step`
    best_step: int
    best_score: float  # accuracy on the dev examples
    log: np.ndarray  # float32 (steps, queries), written up to `step`
    history: list[dict[str, float]]


class _Run:
    """A run's fixed parts."""

    def __init__(self, whole: Checkpoint, config: Config, progress: bool) -> None:
        self.config, self.progress, self.folder = config, progress, Path(config.output)
        is_whole = config.layers in (0, whole.architecture.depth)
        below, self.model = (None, whole) if is_whole else loading.split(whole, config.layers)
        window, tokenizer = whole.architecture.context, whole.tokenizer
        if config.max_tokens > window:
            raise ValueError(
                f"max_tokens must be at most {window}, the model's context, got "
                f"{config.max_tokens}."
            )
        self._claim_folder()

        def to_read(tokens: data.Tokens) -> data.Tokens:
            """The examples as the model reads them."""
            cache = Path(config.cache or self.folder / "states")
            if below is None:
                return tokens
            return states.with_states(below, tokens, cache, progress=progress)

        examples = data.encode(data.load(config.data, "train"), tokenizer, window)
        lengths = np.array([len(ids) for ids in examples.sequences])
        short = np.flatnonzero(lengths <= config.max_tokens)
        if len(short) < config.batch_size:
            raise ValueError(
                f"batch_size must be at most {len(short)}, the training examples of at most "
                f"{config.max_tokens} tokens, got {config.batch_size}."
            )
        self.examples, self.lengths = to_read(examples.take(short)), lengths[short]
        evaluate = objective.evaluator(self.model.decoder)  # one, so that both compile it once

        def scores_on(texts: data.Texts) -> Callable[[Any], objective.Scores]:
            tokens = to_read(data.encode(texts, tokenizer, window))
            return functools.partial(evaluate, tokens=tokens)

        self.texts = data.load(config.data, "test").sample(config.test_examples, config.seed)
        self.test = scores_on(self.texts)
        dev = data.load(config.data, "dev").sample(config.dev_examples, config.seed)
        self.dev = scores_on(dev)
        self.tx = transformation(config)
        self.params = adapt(self.model, config)
        self.parts = _Parts.of(self.params, config)
        self.trained, self.rest = self.parts.split(self.params)
        self.step = jax.jit(self._step, donate_argnums=(0, 1))
        self.epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def outcome(self) -> Outcome:
        """Train, and read the test examples before and after."""
        config = self.config
        before = self._once("before", self.params)
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        folder = (self.folder / "checkpoints").resolve()
        with ocp.CheckpointManager(folder, options=options) as kept:
            now = self._begin(kept)
            self._write_history(now.history)
            board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=now.step)
            bar = tqdm(total=config.steps, initial=now.step, unit="step", disable=not self.progress)
            with bar, board:
                while now.step < config.steps and not self._is_stale(now):
                    now = self._advance(now, bar, board)
                    if now.step % config.checkpoint_every == 0:
                        self._keep(kept, now)
            self._keep(kept, now)
            kept.wait_until_finished()
        params = self.parts.join(list(map(jnp.asarray, now.best)), self.rest)
        return Outcome(
            model=self.model,
            params=params,
            best_step=now.best_step,
            log=now.log[: now.best_step],
            before=before,
            after=self._once("after", params),
            history=now.history,
            test=self.texts,
        )

    def forward_passes(self, steps: int) -> int:
        """Evaluations of the loss on a batch; a backward pass counts as two."""
        return steps * (3 if self.config.method == "adam" else 2 * self.config.num_queries)

    def _step(
        self, trained: Any, state: Any, rest: Any, batch: objective.Batch
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        """What trains and the state after a step, the loss it saw, and differences of losses."""
        loss, config = objective.loss_fn(self.model.decoder), self.config
        if not config.moves_floats:
            params = self.parts.join(trained, rest)
            updates, state = self.tx.update(
                None, state, params, value_fn=lambda params: loss(params, batch)
            )
            params = optax.apply_updates(params, updates)
            return self.parts.split(params)[0], state, state.losses.mean(), state.differences

        def of_trained(trained: Any) -> jax.Array:
            tree = self.parts.join(trained, rest)
            return zq.quaxify(lambda tree: loss(tree, batch))(tree)

        if config.method == "adam":
            seen, gradient = jax.value_and_grad(of_trained)(trained)
            updates, state = self.tx.update(gradient, state, trained)
            differences = jnp.zeros(config.num_queries)
        else:
            updates, state = self.tx.update(None, state, trained, value_fn=of_trained)
            seen, differences = state[0].losses.mean(), state[0].differences
        return optax.apply_updates(trained, updates), state, seen, differences

    def _advance(self, now: _Progress, bar: Any, board: SummaryWriter) -> _Progress:
        """The next step, and a look at the dev examples when it is time."""
        config, began = self.config, time.perf_counter()
        trained, state, seen, differences = self.step(
            now.trained, now.state, self.rest, self._batch(now.step)
        )
        now.log[now.step] = np.asarray(differences)
        seconds = time.perf_counter() - began
        now = now._replace(step=now.step + 1, trained=trained, state=state)
        board.add_scalar("loss", float(seen), now.step)
        bar.update()
        bar.set_postfix_str(
            f"{self.forward_passes(1) / seconds:.1f} forward passes/s, loss {float(seen):.3f}, "
            f"dev {max(now.best_score, 0):.1%} at {now.best_step}, {_resident():.0f} MB",
            refresh=False,
        )
        if now.step % config.eval_every and now.step != config.steps:
            return now
        scores = self.dev(self.parts.join(trained, self.rest))
        line = {
            "step": now.step,
            "loss": float(seen),
            "dev_loss": scores.loss,
            "dev_accuracy": scores.accuracy,
            "forward_passes": self.forward_passes(now.step),
            "seconds_a_step": seconds,
            "resident_mb": _resident(),
        }
        for name in ("dev_loss", "dev_accuracy", "forward_passes", "resident_mb"):
            board.add_scalar(name, line[name], now.step)
        now = now._replace(history=[*now.history, line])
        self._write_history([line], "a")
        if scores.accuracy > now.best_score:
            best = [np.array(x) for x in trained]
            now = now._replace(best=best, best_step=now.step, best_score=scores.accuracy)
        return now

    def _batch(self, step: int) -> objective.Batch:
        size, seed = self.config.batch_size, self.config.seed
        epoch, place = divmod(step, len(self.examples) // size)
        if self.epoch[0] != epoch:
            self.epoch = epoch, data.batches(self.lengths, size, seed, epoch)
        return objective.batch_of(self.examples, self.epoch[1][place])

    def _is_stale(self, now: _Progress) -> bool:
        patience = self.config.patience * self.config.eval_every
        return bool(patience) and now.step - now.best_step >= patience

    def _begin(self, kept: ocp.CheckpointManager) -> _Progress:
        """The first step, or where the last checkpoint was."""
        state = self.tx.init(self.trained if self.config.moves_floats else self.params)
        log = np.zeros((self.config.steps, self.config.num_queries), np.float32)
        fresh = [jnp.array(x) for x in self.trained]  # copies, that steps may write over
        best = [np.array(x) for x in self.trained]
        now = _Progress(0, fresh, state, best, 0, -1.0, log, [])
        step = kept.latest_step()
        if step is None:
            return now
        arrays = _arrays(now)
        found = kept.restore(
            step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardRestore(arrays), facts=ocp.args.JsonRestore()
            ),
        )
        leaves = [jnp.asarray(x) for x in found["arrays"]["state"]]
        typed = [
            jax.random.wrap_key_data(x) if _is_key(like) else x
            for x, like in zip(leaves, jax.tree.leaves(state), strict=True)
        ]
        return _Progress(
            trained=[jnp.array(x) for x in found["arrays"]["trained"]],
            state=jax.tree.unflatten(jax.tree.structure(state), typed),
            best=[np.array(x) for x in found["arrays"]["best"]],
            log=np.array(found["arrays"]["log"]),
            **found["facts"],
        )

    def _keep(self, kept: ocp.CheckpointManager, now: _Progress) -> None:
        if kept.latest_step() == now.step:
            return
        facts = {name: getattr(now, name) for name in _FACTS}
        kept.save(
            now.step,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(_arrays(now)), facts=ocp.args.JsonSave(facts)
            ),
        )

    def _claim_folder(self) -> None:
        """Note the settings in the folder, or see that an interrupted run there had the same."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        settings = json.loads(json.dumps(dataclasses.asdict(self.config)))  # tuples are lists there
        if path.is_file():
            other = json.loads(path.read_text())
            changed = [key for key in settings if other.get(key) != settings[key]]
            changed = [key for key in changed if key != "output"]
            if changed:
                raise ValueError(
                    f"output: {self.folder} holds a run with another {changed[0]}, "
                    f"{other.get(changed[0])!r} instead of {settings[changed[0]]!r}: name another "
                    "folder, or delete this one."
                )
        _write_json(path, settings)

    def _once(self, name: str, params: Any) -> objective.Scores:
        """Scores on the test examples that were measured before, or are measured now and kept."""
        path = self.folder / f"{name}.json"
        if path.is_file():
            return objective.Scores(**json.loads(path.read_text()))
        scores = self.test(params)
        _write_json(path, scores._asdict())
        return scores

    def _write_history(self, lines: list[dict[str, float]], mode: str = "w") -> None:
        with (self.folder / "metrics.jsonl").open(mode) as file:
            file.writelines(f"{json.dumps(line)}\n" for line in lines)


_FACTS = ("step", "best_step", "best_score", "history")


class _Parts(NamedTuple):
    """How parameters fall into arrays that a run changes and the rest."""

    shape: Any  # of the whole tree
    changes: tuple[bool, ...]  # for each of its leaves

    @classmethod
    def of(cls, params: Any, config: Config) -> "_Parts":
        shape = jax.tree.structure(params)
        if config.moves_floats:
            return cls(shape, tuple(jax.tree.leaves(is_factor(params))))
        changes = []
        for leaf in jax.tree.leaves(params, is_leaf=zq.is_quantized):
            moved = None
            if is_trained(leaf):
                moved = leaf.scale if config.train == "scales" else leaf.packed
            changes += [array is moved for array in jax.tree.leaves(leaf)]
        return cls(shape, tuple(changes))

    def split(self, params: Any) -> tuple[list[Any], list[Any]]:
        leaves = list(zip(jax.tree.leaves(params), self.changes, strict=True))
        return [x for x, yes in leaves if yes], [x for x, yes in leaves if not yes]

    def join(self, trained: list[Any], rest: list[Any]) -> Any:
        some, others = iter(trained), iter(rest)
        leaves = [next(some) if yes else next(others) for yes in self.changes]
        return jax.tree.unflatten(self.shape, leaves)


def _arrays(now: _Progress) -> dict[str, Any]:
    """The arrays of a checkpoint, in lists."""
    state = [jax.random.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(now.state)]
    lists = {"trained": now.trained, "best": now.best, "state": state}
    return {**{name: list(map(np.asarray, some)) for name, some in lists.items()}, "log": now.log}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


def _resident() -> float:
    """The process's resident memory at its highest, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
