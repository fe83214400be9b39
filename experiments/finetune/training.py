"""The loop of a fine-tuning run: steps, looks at the dev examples, checkpoints, and going on.

All that a run depends on is its configuration and the number of the step, so that a run which was
killed goes on from its last checkpoint bit for bit. What trains is a few arrays (`parts.py`);
everything else is read from the model's file again.
"""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tensorboardX import SummaryWriter
from tqdm import tqdm

import zoqo_jax as zq
from experiments import footprint
from experiments.cluster import ALONE, Team, here
from experiments.command import say, whole
from experiments.finetune import data, objective, sharing, states
from experiments.finetune.batches import Batches, training_tokens
from experiments.finetune.config import Config
from experiments.finetune.folder import Folder, Progress
from experiments.finetune.methods import transformation
from experiments.finetune.models import loading
from experiments.finetune.models.loading import Checkpoint
from experiments.finetune.parts import Parts, adapt
from experiments.finetune.programs import programs

__all__ = ["Outcome", "train"]


class Outcome(NamedTuple):
    """What a run came to.

    Attributes:
      model: what was trained, the whole model or its last layers, without the parameters it had.
      params: its trained parameters, at the step that answered the dev examples best.
      best_step: that step.
      log: differences of losses of the steps up to it, float32 (steps, queries); see `zq.replay`.
      before: scores on the test examples before the run.
      after: and at `best_step`.
      dev_before: scores on the dev examples before the run; None where it has no steps.
      examples: how many there are, by their split.
      history: what was measured on the way, a dictionary for each look at the dev examples.
      forward_passes: of a batch, in training.
      test: the test examples.
      remarks: what a reader of the scores should know of the examples.
    """

    model: Checkpoint
    params: Any
    best_step: int
    log: np.ndarray
    before: objective.Scores
    after: objective.Scores
    dev_before: objective.Scores | None
    examples: dict[str, int]
    history: list[dict[str, float]]
    forward_passes: int
    test: data.Texts
    remarks: list[str]


def train(
    checkpoint: Checkpoint,
    config: Config,
    *,
    progress: bool = True,
    folder: Folder | None = None,
    team: Team = ALONE,
) -> Outcome | None:
    """Fine-tune a model, or go on where an interrupted run of these settings stopped.

    Args:
      checkpoint: the model.
      config: the settings.
      progress: whether to show a progress bar, and say what is being done.
      folder: of the run, where the caller has entered it.
      team: the processes that make the run; process 0 has the outcome, and the others None.

    Raises:
      ValueError: data, model and settings that do not fit each other, or other processes'.
    """
    if folder is None:
        with Folder(config) as folder:
            return train(checkpoint, config, progress=progress, folder=folder, team=team)
    run = _Run(checkpoint, config, folder, progress, team)
    del checkpoint  # a run copies what trains: the caller should have no other copy either
    outcome = run.outcome()
    del run  # and with it programs and examples
    footprint.give_back()
    return outcome


class _Run:
    """A run's fixed parts; its folder is not touched before all of them fit each other."""

    def __init__(
        self,
        all_layers: Checkpoint,
        config: Config,
        folder: Folder,
        progress: bool,
        team: Team,
    ) -> None:
        self.config, self.progress, self.folder, self.team = config, progress, folder, team
        all_layers = loading.in_dtype(all_layers, config.dtype)
        below, model = loading.split(all_layers, config.layers_of(all_layers.architecture.depth))
        self._say("preparing the examples")
        self.mesh, self.tx = sharing.spread(transformation(config), config, team)
        self.params = adapt(model, config)
        self.model = model._replace(params={})
        self.parts = Parts.of(self.params, config)
        trained, self.rest = self.parts.split(self.params)
        self.shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in trained]
        by_dev = config.test == "dev"
        texts = data.load_all(config.data, config.dev, "" if by_dev else config.test)
        for part, count in (("dev", config.dev_examples), ("test", config.test_examples)):
            texts[part] = texts[part].sample(count, config.seed)
        texts["test"] = texts["dev"] if by_dev else texts["test"]
        self.test_texts, self.remarks = texts["test"], data.remarks(texts)
        for remark in self.remarks:
            say(f"data: {remark}")
        tokens = {"train": training_tokens(texts["train"], all_layers, config)}
        for part in ("dev", "test"):
            tokens[part] = data.encode_for(texts[part], all_layers, config.normalise)
            if not len(tokens[part]):
                raise ValueError(f"data: {config.data} has no {part} examples.")
        self.counts = {part: len(some) for part, some in tokens.items()}
        sharing.check_start(team, folder.settings, tokens, all_layers.params)
        folder.begin()
        if below is not None:
            cache = Path(config.cache or folder.scratch / "states")
            places = map(Batches(tokens["train"], config).places, range(config.steps))
            # A cache is for runs that may read other examples, or the same in another order.
            asked = {} if config.cache else {"train": places}
            for part in tokens:
                tokens[part] = states.with_states(
                    below, tokens[part], cache, asked.get(part), progress=progress
                )
        self.batches = Batches(tokens["train"], config)
        evaluate = objective.evaluator(self.model.decoder)  # one, so that both compile it once
        self.dev = functools.partial(evaluate, tokens=tokens["dev"])
        self.test = functools.partial(evaluate, tokens=tokens["test"])
        self.step = programs(self._step, donate=(0, 1))
        self.told: list[zq.Info] = []

    def outcome(self) -> Outcome | None:
        """Train, and read the test examples before and after."""
        counts = ", ".join(f"{count:,} {part}" for part, count in self.counts.items())
        span, depth = self.model.span, self.model.architecture.depth
        layers = f"the last {len(span)} of {depth} layers" if len(span) < depth else "all layers"
        self._say(f"examples: {counts}\ntraining {layers}")
        self._say("first look at the test and dev examples: compiling")
        before = self.dev_before = None
        if self.team.is_first:
            before = self.folder.once("before", lambda: self.test(self.params))
        if self.team.is_first and self.config.steps:
            by_dev = self.config.test == "dev"
            look = (lambda: before) if by_dev else (lambda: self.dev(self.params))
            self.dev_before = self.folder.once("dev_before", look)
        with self.folder.checkpoints() as checkpoints:
            now = sharing.begin(checkpoints.last(self._start()), self.mesh, self.team)
            self.rest = sharing.on_all(self.rest, self.mesh)
            self.folder.write_history(now.history)
            board = SummaryWriter(str(self.folder.scratch / "tensorboard"), purge_step=now.step)
            bar = tqdm(
                total=self.config.steps, initial=now.step, unit="step", disable=not self.progress
            )
            with bar, board:
                if not self._is_over(now):
                    bar.set_postfix_str(f"{self._dev_words(now)}, compiling a step")
                now = self._steps(now, checkpoints, bar, board)
            sharing.check_codes(self.team, now)
            self.team.leave()
            if not self.team.is_first:
                return None
            self._say("reading the test examples")
            self.rest = here(self.rest)
            trained, now = here(now.trained), now._replace(trained=[])
            del self.step  # and its programs, before the test examples are read
            footprint.give_back()
            if now.best_step != now.step:
                del trained
                trained = checkpoints.best(now, self.shapes)
        params = self.parts.join(trained, self.rest)
        # A run that may be made longer may come to a better step.
        after = f"after_{now.best_step}" if self.config.looks else "after"
        return Outcome(
            model=self.model,
            params=params,
            best_step=now.best_step,
            log=now.log[: now.best_step],
            before=before,
            after=self.folder.once(after, lambda: self.test(params)),
            dev_before=self.dev_before,
            examples=self.counts,
            history=now.history,
            forward_passes=self.forward_passes(now),
            test=self.test_texts,
            remarks=[*self.remarks, *self._trouble()],
        )

    def _steps(self, now: Progress, checkpoints: Any, bar: Any, board: SummaryWriter) -> Progress:
        """All steps that are left. A stop waits for the end of a step, and writes a checkpoint."""
        try:
            while True:
                if self._is_due(now):
                    now = self._look(now, board)
                    if now.best_step == now.step:
                        checkpoints.write(now)
                if self._is_over(now):
                    break
                if now.step and now.step % self.config.checkpoint_every == 0:
                    sharing.check_codes(self.team, now)
                    checkpoints.write(now)
                with whole("this step"):
                    now = self._advance(now, bar, board)
        finally:
            if now.step:
                checkpoints.write(now)
        return now

    def _dev_words(self, now: Progress) -> str:
        """How well the dev examples were answered at best, and before the run."""
        words = f"dev {self.dev_before.accuracy:.1%} before" if self.dev_before else ""
        return f"{words}, {now.best_accuracy:.1%} at {now.best_step}" if now.history else words

    def _say(self, text: str) -> None:
        if self.progress:
            say(text)

    def _info(self, state: Any) -> zq.Info:
        """What the last step told; floats have an optimizer behind it."""
        return (state[0] if self.config.moves_floats or self.config.guide_every else state).info

    def _trouble(self) -> list[str]:
        """What is wrong with the steps that were just made."""
        found = [f"Of this run: {x}" for x in zq.health(self.told).findings] if self.told else []
        for finding in found:
            say(finding)
        return found

    @property
    def passes_a_step(self) -> int:
        """Evaluations of the loss, looks at its size aside; a backward pass counts as two."""
        return 3 if self.config.method == "adam" else 2 * self.config.num_queries

    def forward_passes(self, now: Progress) -> int:
        """Evaluations of the loss on a batch so far."""
        if self.config.sized:
            return int(self._info(now.state).evaluations)
        return now.step * self.passes_a_step

    def _step(
        self, trained: Any, state: Any, rest: Any, batch: objective.Batch
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        """What trains and the state after a step, the loss it saw, and differences of losses."""
        loss, config = objective.loss_fn(self.model.decoder), self.config
        if not config.moves_floats:
            params, asked = self.parts.join(trained, rest), self._asked(loss, batch)
            if config.guide_every:
                of_steps, guides = state
                updates, of_steps = self.tx.update(None, of_steps, params, guides=guides, **asked)
                state = of_steps, guides
            else:
                updates, state = self.tx.update(None, state, params, **asked)
            info = self._info(state)
            trained, _ = self.parts.split(optax.apply_updates(params, updates))
            return trained, state, info.losses.mean(), info.log

        def of_trained(trained: Any, batch: objective.Batch = batch) -> jax.Array:
            tree = self.parts.join(trained, rest)
            return zq.quaxify(lambda tree: loss(tree, batch))(tree)

        if config.method == "adam":
            seen, gradient = jax.value_and_grad(of_trained)(trained)
            updates, state = self.tx.update(gradient, state, trained)
            differences = jnp.zeros(config.num_queries)
        else:
            updates, state = self.tx.update(None, state, trained, **self._asked(of_trained, batch))
            info = self._info(state)
            seen, differences = info.losses.mean(), info.log
        return optax.apply_updates(trained, updates), state, seen, differences

    def _asked(self, loss: Callable[..., jax.Array], batch: objective.Batch) -> dict[str, Any]:
        """What a transformation is given, to ask for the loss of a batch."""
        if self.mesh is None:
            return {"value_fn": lambda params: loss(params, batch)}
        of_each, some = objective.divided(batch)
        return {"value_fn": lambda params, rows: loss(params, some(rows)), "batch": of_each}

    def _start(self) -> Progress:
        """Where a run begins; the parameters that it began with are let go."""
        params, self.params = self.params, None
        trained, _ = self.parts.split(params)
        state = self.tx.init(trained if self.config.moves_floats else params)
        if self.config.guide_every:
            state = state, self._guides(trained, self.batches(0))
        each = (self.config.num_queries, 2) if self.config.sized else (self.config.num_queries,)
        log = np.zeros((self.config.steps, *each), np.float32)
        fresh = [jnp.array(x) for x in trained]  # copies, that steps may write over
        return Progress(0, fresh, state, log, [], {})

    def _advance(self, now: Progress, bar: Any, board: SummaryWriter) -> Progress:
        """The next step."""
        began, batch, state = time.perf_counter(), self.batches(now.step), now.state
        if self.config.guide_every and now.step % self.config.guide_every == 0:
            state = state[0], self._guides(now.trained, batch)
        trained, state, seen, differences = self.step(now.trained, state, self.rest, batch)
        now.log[now.step] = np.asarray(differences)
        if self.config.method != "adam":
            self.told.append(jax.device_get(self._info(state)))
        seconds = time.perf_counter() - began
        last = {"loss": float(seen), "seconds_a_step": seconds}
        now = now._replace(step=now.step + 1, trained=trained, state=state, last=last)
        board.add_scalar("loss", float(seen), now.step)
        bar.update()
        bar.set_postfix_str(
            f"{self.passes_a_step / seconds:.1f} forward passes/s, loss {float(seen):.3f}, "
            f"{self._dev_words(now)}, {footprint.peak():.0f} MiB",
            refresh=False,
        )
        return now

    def _guides(self, trained: Any, batch: objective.Batch) -> dict[str, zq.directions.Guide]:
        """What multiplies each matrix that trains, of a batch's examples."""
        loss, params = objective.loss_fn(self.model.decoder), self.parts.join(trained, self.rest)
        seen = zq.observe(lambda params: loss(params, batch), params)
        return {name: one.guide for name, one in seen.items()}

    def _is_over(self, now: Progress) -> bool:
        looks = self.config.looks
        made = now.history[-1]["forward_passes"] if now.history else 0
        return (
            now.step >= self.config.steps
            or self._is_stale(now)
            or bool(looks and made >= looks[-1])
        )

    def _is_due(self, now: Progress) -> bool:
        """Whether this step wants a look at the dev examples, and has had none."""
        at_last = now.step == self.config.steps
        if self.config.looks and not at_last:
            made = now.history[-1]["forward_passes"] if now.history else 0
            upcoming = [look for look in self.config.looks if look > made]
            return bool(upcoming) and self.forward_passes(now) >= upcoming[0]
        due = now.step > 0 and (at_last or now.step % self.config.eval_every == 0)
        return due and (not now.history or now.history[-1]["step"] != now.step)

    def _look(self, now: Progress, board: SummaryWriter) -> Progress:
        """A look at the dev examples."""
        line = {}
        if self.team.is_first:
            scores = self.dev(here(self.parts.join(now.trained, self.rest)))
            line = {
                "step": now.step,
                "loss": now.last["loss"],
                "dev_loss": scores.loss,
                "dev_accuracy": scores.accuracy,
                "forward_passes": self.forward_passes(now),
                "seconds_a_step": now.last["seconds_a_step"],
                "resident_mib": footprint.peak(),
            }
        line = self.team.from_first(line)
        for name in ("dev_loss", "dev_accuracy", "forward_passes", "resident_mib"):
            board.add_scalar(name, line[name], now.step)
        now = now._replace(history=[*now.history, line])
        self.folder.write_history([line], "a")
        return now

    def _is_stale(self, now: Progress) -> bool:
        patience = self.config.patience * self.config.eval_every
        return bool(patience) and now.step - now.best_step >= patience
