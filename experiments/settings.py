"""Settings of experiments: frozen dataclasses, which are their own command lines.

A dataclass says what each setting is once, under "Attributes:" of its docstring; `define` makes
flags of it, and `check` refuses what its types do not allow. What is wrong is named, and its value.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal

from absl import app, flags

__all__ = ["arguments", "check", "define", "parser"]

flags.disclaim_key_flags()  # they belong to the command that asks for them, and to its --help


def check(
    config: Any,
    *,
    least: dict[str, float] | None = None,
    within: dict[str, tuple[float, float]] | None = None,
    fractions: Collection[str] = (),
    multiples: dict[str, int] | None = None,
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
) -> None:
    """Refuse settings that are out of range, or of which one is: those of a tuple are each checked.

    Args:
      config: a dataclass; its settings of a `Literal` type must be one of the choices.
      least: the least that settings may be, by name.
      within: the least and the most, by name.
      fractions: names of numbers that must be above 0 and below 1.
      multiples: what positive whole numbers must be a multiple of, by name.
      positive: names of numbers that must be positive and finite.
      not_negative: names of numbers that must be finite, and zero or more.

    Raises:
      ValueError: one is; it is named, and its value.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...   loss: Literal["margin", "cross_entropy"] = "margin"
      ...   bits: tuple[int, ...] = (4, 8)
      >>> check(Config(bits=(4, 9)), within={"bits": (2, 8)})
      Traceback (most recent call last):
      ValueError: bits must be in [2, 8], got 9.
    """
    for name, allowed in _choices(type(config)).items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {getattr(config, name)!r}.")

    def refuse(name: str, what: str, allows: Callable[[float], bool]) -> None:
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if not allows(value):
                raise ValueError(f"{name} must be {what}, got {value}.")

    for name, low in (least or {}).items():
        refuse(name, f"at least {low}", lambda x, low=low: x >= low)
    for name, (low, high) in (within or {}).items():
        refuse(name, f"in [{low}, {high}]", lambda x, low=low, high=high: low <= x <= high)
    for name in fractions:
        refuse(name, "in (0, 1)", lambda x: 0 < x < 1)
    for name, unit in (multiples or {}).items():
        refuse(name, f"a multiple of {unit}", lambda x, unit=unit: x > 0 and x % unit == 0)
    for name in positive:
        refuse(name, "positive and finite", lambda x: 0 < x < math.inf)
    for name in not_negative:
        refuse(name, "finite and not negative", lambda x: 0 <= x < math.inf)


def define(kind: type, leave_out: Collection[str] = ()) -> Callable[[], dict[str, Any]]:
    """Define a flag for each setting, which without a default must be given.

    Args:
      kind: a dataclass of bools, numbers, strings, choices, and tuples of strings or whole numbers.
      leave_out: settings that get none.

    Returns:
      A function that gives the settings as the flags have them, once these were parsed.
    """
    texts, choices, hints = _descriptions(kind), _choices(kind), typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in leave_out]
    makers: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
    }
    for name in names:
        default, text = kind.__dataclass_fields__[name].default, texts[name]
        required = default is dataclasses.MISSING
        default = None if required else default
        if name in choices:
            flags.DEFINE_enum(name, default, choices[name], text, required=required)
        elif typing.get_origin(hints[name]) is tuple:
            flags.DEFINE_list(name, list(map(str, default or ())), text, required=required)
        else:
            makers[hints[name]](name, default, text, required=required)

    def given() -> dict[str, Any]:
        values = {name: getattr(flags.FLAGS, name) for name in names}
        return {name: items(name, x) if isinstance(x, list) else x for name, x in values.items()}

    def items(name: str, given: list[str]) -> tuple[Any, ...]:
        if typing.get_args(hints[name])[0] is str:
            return tuple(given)
        if bad := [one for one in given if not one.strip().isdigit()]:
            raise ValueError(f"{name} must be whole numbers, got {bad[0]!r}.")
        return tuple(map(int, given))

    return given


def arguments(config: Any) -> list[str]:
    """The command line that gives these settings to `parser`.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...   layers: tuple[str, ...] = ("q", "v")
      ...   bits: tuple[int, ...] = (4, 8)
      >>> arguments(Config())
      ['--layers=q,v', '--bits=4,8']
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in values.items()
    ]


def parser(kind: type) -> Callable[[list[str]], Any]:
    """Define its flags; a `flags_parser` for `absl.app.run` whose main function takes a `kind`."""
    given = define(kind)

    def parse(argv: list[str]) -> Any:
        rest = app.parse_flags_with_usage(argv)[1:]
        try:
            if rest:
                raise ValueError(f"unknown arguments: {' '.join(rest)}")
            return kind(**given())
        except ValueError as error:
            sys.exit(f"error: {error}\nPass --help to see every setting.")

    return parse


def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(kind)
    return {
        name: typing.get_args(hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }


def _descriptions(kind: type) -> dict[str, str]:
    """What a dataclass says of each of its settings."""
    found: dict[str, str] = {}
    name = ""
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        if line.strip() in ("Raises:", "Example:", "Examples:"):
            break
        head, colon, tail = line.strip().partition(": ")
        if colon and head in kind.__dataclass_fields__:
            name, line = head, tail
        if name:
            found[name] = f"{found.get(name, '')} {line.strip()}".strip()
    return found
