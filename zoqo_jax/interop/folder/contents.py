"""What a folder of safetensors holds, by its headers and its config: no tensor is read.

The config says which of the `formats` quantized the folder, and the format which stored tensors
each quantized one is made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.interop.folder import shards
from zoqo_jax.interop.formats import FORMATS
from zoqo_jax.interop.formats.protocol import Format, Stored
from zoqo_jax.interop.safetensors import as_jax

__all__ = ["Contents", "contents_of"]

_CONFIG, _OTHERS = "config.json", ("quantize_config.json", "quant_config.json")
_SAYS = ("quantization_config", "quantization")
_MOST_JSON = 1 << 24


class Contents(NamedTuple):
    """What headers and config say, and how quantized tensors are put together."""

    places: dict[str, shards.Place]
    config: dict[str, Any]
    format: Format | None
    settings: Any
    parts: dict[str, tuple[str, ...]]

    def stored(self, name: str) -> dict[str, np.ndarray]:
        """The stored tensors of a quantized one, read-only."""
        found = {part: shards.read(self.places[part]) for part in self.parts[name]}
        for array in found.values():
            array.flags.writeable = False
        return found

    @property
    def plain(self) -> list[str]:
        """The names of stored tensors that belong to no quantized one."""
        taken = {part for parts in self.parts.values() for part in parts}
        return [name for name in self.places if name not in taken]

    @property
    def names(self) -> list[str]:
        """The names of all tensors."""
        return [*self.parts, *self.plain]

    def size(self, name: str) -> int:
        """The bytes that are stored of a tensor."""
        return sum(self.places[part].size for part in self.parts.get(name, (name,)))

    def read(self, name: str) -> Any:
        """A tensor, quantized or not."""
        if name not in self.parts or self.format is None:
            return as_jax(shards.read(self.places[name]))
        return self.format.decode(name, self.stored(name), self.settings)


def contents_of(path: Path) -> Contents:
    """What a folder or file holds, checked, before any of its tensors is read."""
    places = shards.places(path)
    config = _config(path)
    format, settings = _format(_said(path, config))
    parts: dict[str, tuple[str, ...]] = {}
    if format is not None:
        stored = {name: Stored(place.dtype, place.shape) for name, place in places.items()}
        parts = format.names(stored, settings)
    owners: dict[str, str] = {}
    for name, own in parts.items():
        if name in places and name not in own:
            raise ValueError(f"tensor {name!r} is stored both as such and as {own[0]!r}.")
        for part in own:
            if part not in places:
                raise ValueError(f"tensor {name!r}: there is no {part}.")
            if owners.setdefault(part, name) != name:
                raise ValueError(f"tensor {part!r} belongs to {name!r} and {owners[part]!r}.")
    return Contents(places, config, format, settings, parts)


def _config(path: Path) -> dict[str, Any]:
    """The content of the folder's `config.json`."""
    folder = path if path.is_dir() else path.parent
    return _json(folder / _CONFIG)


def _said(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config, with a quantization's own file put in where it says nothing of one."""
    if any(config.get(key) is not None for key in _SAYS):
        return config
    folder = path if path.is_dir() else path.parent
    for name in _OTHERS:
        if found := _json(folder / name):
            return {**config, _SAYS[0]: found}
    return config


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    if not shards.is_inside(file, file.parent):
        raise ValueError(f"{file}: it is a link out of its folder, to {file.resolve()}.")
    if file.stat().st_size > _MOST_JSON:
        raise ValueError(f"{file}: it must be at most {_MOST_JSON} bytes.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: it is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: it must be a JSON object, got {found!r:.60}.")
    return found


def _format(config: Mapping[str, Any]) -> tuple[Format | None, Any]:
    """The format that a config describes, and what it says of it."""
    for format in FORMATS:
        settings = format.settings(config)
        if settings is not None:
            return format, settings
    for key in _SAYS:
        if config.get(key) is not None:
            known = ", ".join(format.name for format in FORMATS)
            raise ValueError(f"{key}: only {known} are read, got {config[key]!r:.200}.")
    return None, None
