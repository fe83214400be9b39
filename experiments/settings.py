"""Settings of experiments: frozen dataclasses, which are their own command lines.

A dataclass says what each setting is once, under "Attributes:" of its docstring, or under "Rarely
needed:" after them, which --help leaves to --helpfull; `Line` reads a command line for it by absl,
and `check` refuses what its types do not allow. What is wrong is named as it was typed, and its
value: absl's own parsers, and those of simple-parsing and tyro, which read dataclasses, have
messages of their own, and absl knows neither dataclasses nor dashes in names.
"""

import dataclasses
import difflib
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

from absl import flags

__all__ = ["Line", "arguments", "check"]

_HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")
_RARE = "Rarely needed:"
_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false"}
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


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


class Line:
    """A command line of dataclasses' settings.

    Args:
      argv: the arguments.
      kinds: dataclasses of bools, numbers, strings, choices, and tuples of strings or whole
        numbers; any of them may be None by default. Of a name that several have, the flag is the
        first one's.
      leave_out: settings that get no flag and have their defaults.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...   learning_rate: float
      ...   bits: tuple[int, ...] = (4, 8)
      >>> Line(["--learning-rate=0.5", "--bits", "2"], [Config]).settings()
      [Config(learning_rate=0.5, bits=(2,))]
      >>> Line(["--learning_rat=0.5"], [Config]).settings()
      Traceback (most recent call last):
      ValueError: unknown flag --learning_rat: is it --learning_rate?
    """

    def __init__(
        self, argv: Sequence[str], kinds: Sequence[type], leave_out: Collection[str] = ()
    ) -> None:
        self._kinds = kinds
        self._fields: dict[str, _Flag] = {}
        for kind in kinds:
            for field in dataclasses.fields(kind):
                if field.name not in leave_out:
                    self._fields.setdefault(field.name, _Flag(kind, field))
        self._names: dict[str, str] = {}  # as they were typed
        self._argv = [self._normal(one) for one in argv]
        self.asks_for_help = any(one in _HELP for one in argv)
        self._asks_for_all = "--helpfull" in argv

    def settings(self) -> list[Any]:
        """An object of each kind.

        Raises:
          ValueError: the line does not say what the kinds need, or something that they refuse.
        """
        values = flags.FlagValues()  # the command's own: libraries define flags, too
        for flag in self._fields.values():
            flags.DEFINE_flag(flag.absl(), values)
        try:
            rest = values(["", *self._argv])[1:]
        except flags.UnrecognizedFlagError as error:
            name = self._names.get(error.flagname, error.flagname)
            raise ValueError(f"unknown flag --{name}: {self._meant(error.flagname)}") from None
        except _Refused as error:
            raise ValueError(str(error)) from None
        except (flags.Error, ValueError) as error:
            raise ValueError(f"{error}.") from None
        if rest:
            raise ValueError(f"unknown argument {rest[0]!r}: settings are given as --NAME=VALUE.")
        given = {name: values[name].value for name in self._fields}
        given = {name: value for name, value in given.items() if value is not None}
        missing = [f for f in self._fields.values() if f.required and f.name not in given]
        if missing:
            raise ValueError(f"{missing[0].name} must be given: {missing[0].text}")
        return [
            kind(**{name: x for name, x in given.items() if self._fields[name].kind is kind})
            for kind in self._kinds
        ]

    def typed(self, message: str) -> str:
        """A message whose first word is a setting, with the flag in its place as it was typed.

        Example:
          >>> @dataclasses.dataclass(frozen=True)
          ... class Config:
          ...   num_images: int = 3
          >>> Line(["--num-images=0"], [Config]).typed("num_images must be at least 1, got 0.")
          '--num-images must be at least 1, got 0.'
        """
        found = re.match(r"\w+", message)
        if found is None or found[0] not in self._fields:
            return message
        return f"--{self._names.get(found[0], found[0])}{message[found.end() :]}"

    def help(self, about: str) -> str:
        """What the command is for, and its settings in the order of the dataclasses."""
        rare = [] if self._asks_for_all else [x for x in self._fields.values() if x.is_rare]
        needed = [f"--{flag.name}=..." for flag in self._fields.values() if flag.required]
        usage = " ".join(["usage: python -m", _module(), *needed, "[--NAME=VALUE ...]"])
        listed = "\n".join(flag.help() for flag in self._fields.values() if flag not in rare)
        more = f"--helpfull lists {len(rare)} more: {', '.join(flag.name for flag in rare)}."
        more = "\n\n" + textwrap.fill(more, 96) if rare else ""
        return f"{about.strip()}\n\n{usage}\n\n{listed}{more}"

    def _normal(self, argument: str) -> str:
        """The argument with the flag's own name; how it was typed is remembered."""
        head, equals, value = argument.partition("=")
        if not head.startswith("--") or head == "--":
            return argument
        typed = head.removeprefix("--")
        name = typed.replace("-", "_")
        off = name.removeprefix("no_")
        if off != name and off in self._fields:
            name = f"no{off}"
        self._names[name] = typed
        self._names.setdefault(name.removeprefix("no"), typed)
        return f"--{name}{equals}{value}"

    def _meant(self, name: str) -> str:
        """The flag that was perhaps meant."""
        close = difflib.get_close_matches(name, self._fields, 1)
        close = close or [one for one in self._fields if name in one]
        return f"is it --{close[0]}?" if close else "--help lists all."


class _Refused(Exception):
    """What a flag cannot be; absl would give a ValueError its own words."""


class _Flag(flags.ArgumentParser):
    """The flag of a setting, which reads its values."""

    def __init__(self, kind: type, field: Any) -> None:
        hint = typing.get_type_hints(kind)[field.name]
        if typing.get_origin(hint) in (types.UnionType, typing.Union):
            (hint,) = set(typing.get_args(hint)) - {type(None)}
        self.kind, self.name, self.default, self.hint = kind, field.name, field.default, hint
        self.required = field.default is dataclasses.MISSING
        self.text, self.is_rare = _descriptions(kind).get(field.name, ("", False))
        self.choices = _choices(kind).get(field.name)

    def absl(self) -> flags.Flag:
        """The flag for absl, which says nothing of a default: the dataclass has it."""
        return flags.Flag(self, None, self.name, None, self.text, boolean=self.hint is bool)

    def parse(self, argument: Any) -> Any:
        """A value from its text."""
        text = str(argument)
        if text.startswith("--"):
            raise _Refused(f"{self.name} needs a value, got the flag {text!r}.")
        if not text.strip() and self.default not in ("", ()):
            raise _Refused(f"{self.name} must not be empty.")
        if self.choices is not None:
            if text not in self.choices:
                raise _Refused(f"{self.name} must be one of {self.choices}, got {text!r}.")
            return text
        if typing.get_origin(self.hint) is not tuple:
            return self._one(text, self.hint)
        items = [item.strip() for item in text.split(",")] if text.strip() else []
        if "" in items:
            raise _Refused(f"{self.name} must have no empty item, got {text!r}.")
        return tuple(self._one(item, typing.get_args(self.hint)[0]) for item in items)

    def _one(self, text: str, kind: type) -> Any:
        try:
            found = _TRUTH[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            found = None
        if found is None or (kind is float and not math.isfinite(found)):
            raise _Refused(f"{self.name} must be {_KINDS[kind]}, got {text!r}.")
        return found

    def help(self) -> str:
        """What --help says of it."""
        value = self.default
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value
        head = f"  --[no]{self.name}" if self.hint is bool else f"  --{self.name}"
        if self.required:
            head += "=...  (required)"
        elif self.hint is bool:
            head += f"  (default: {str(value).lower()})"
        elif value is not None:
            head += f"={value}"
        return f"{head}\n{textwrap.indent(textwrap.fill(self.text, 90), ' ' * 6)}"


def _module() -> str:
    """What `python -m` runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


def _choices(kind: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(kind)
    return {
        name: typing.get_args(hint)
        for name, hint in hints.items()
        if typing.get_origin(hint) is Literal
    }


def _descriptions(kind: type) -> dict[str, tuple[str, bool]]:
    """What a dataclass says of each of its settings, and whether that is rarely needed."""
    found: dict[str, tuple[str, bool]] = {}
    name, is_rare = "", False
    for line in (kind.__doc__ or "").partition("Attributes:")[2].splitlines():
        if line.strip() in ("Raises:", "Example:", "Examples:"):
            break
        if line.strip() == _RARE:
            name, is_rare = "", True
        head, colon, tail = line.strip().partition(": ")
        if colon and head in kind.__dataclass_fields__:
            name, line = head, tail
        if name:
            text, _ = found.get(name, ("", is_rare))
            found[name] = f"{text} {line.strip()}".strip(), is_rare
    return found
