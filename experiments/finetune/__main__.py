"""Fine-tune a quantized language model with forward passes only.

    python -m experiments.finetune --model=SmolLM2-135M-Instruct.Q4_1.gguf --output=run

reads a 4-bit GGUF file, trains its codes in place on the bundled film reviews, and writes the same
kind of file, a log that rebuilds it (`zq.replay`), and a report with curves. A run that was stopped
goes on when the same command is given again.
"""

import dataclasses
import sys
import time
import typing

from absl import app, flags, logging

from experiments.finetune import outputs, training
from experiments.finetune.config import Config
from experiments.finetune.models import loading


def main(config: Config) -> None:
    """Run, and say what came of it."""
    logging.set_verbosity(logging.WARNING)  # of the checkpoints, which tell much
    start = time.perf_counter()
    try:
        checkpoint = loading.load(config.model)
        outcome = training.train(checkpoint, config)
        written = outputs.write(config, outcome, time.perf_counter() - start)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {config.output}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{config.name}: test accuracy {outcome.before.accuracy:.1%} before, "
        f"{outcome.after.accuracy:.1%} after {outcome.best_step} steps; wrote "
        f"{', '.join(map(str, written))}"
    )


def _parse(argv: list[str]) -> Config:
    helps = _descriptions()
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        default = None if field.default is dataclasses.MISSING else field.default
        settings = {"required": default is None}
        kind, text = hints[field.name], helps[field.name]
        if typing.get_origin(kind) is typing.Literal:
            flags.DEFINE_enum(field.name, default, typing.get_args(kind), text, **settings)
        elif typing.get_origin(kind) is tuple:
            flags.DEFINE_list(field.name, list(default or ()), text)
        else:
            define = {
                int: flags.DEFINE_integer,
                float: flags.DEFINE_float,
                str: flags.DEFINE_string,
            }
            define[kind](field.name, default, text, **settings)
    rest = flags.FLAGS(argv)[1:]
    if rest:
        raise app.UsageError(f"unknown arguments: {' '.join(rest)}")
    given = {field.name: getattr(flags.FLAGS, field.name) for field in dataclasses.fields(Config)}
    try:
        return Config(**{**given, "targets": tuple(given["targets"])})
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _descriptions() -> dict[str, str]:
    """What `Config` says of each setting."""
    found, name = {}, ""
    text = (Config.__doc__ or "").partition("Attributes:")[2].partition("Raises:")[0]
    for line in text.splitlines():
        head, colon, tail = line.strip().partition(": ")
        if colon and head in Config.__dataclass_fields__:
            name, line = head, tail
        if name:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
