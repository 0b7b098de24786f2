"""Configuration as frozen dataclasses: YAML, dotted overrides, errors with suggestions.

Every package defines its section as a frozen, keyword-only dataclass; this module converts nested
mappings to them and back. A field's type may be a scalar, an optional (`X | None`), a `Literal`,
a tuple, a mapping or another such dataclass. A `__post_init__` may raise `ConfigError` for ranges.
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from switchlm.errors import ConfigError, nearest
from switchlm.files import replace_file

Section = TypeVar("Section")

# Errors of `load_yaml`; impossible dates and bad UTF-8 are plain ValueErrors.
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError)
LARGEST_FILE = 2**20  # bytes
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{ending}": base**power
    for power, letter in enumerate("kmgt", 1)
    for ending, base in (("", 1000), ("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", re.ASCII)


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a few lines of nested ones stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"aliases (*name) are not supported; there is one{mark}")
        return super().compose_node(parent, index)


def load_yaml(text: str) -> Any:
    """Parse YAML without aliases; raises one of UNREADABLE."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def from_mapping(cls: type[Section], values: Mapping[str, Any], path: str = "") -> Section:
    """Build the dataclass `cls` from nested mappings.

    Raises ConfigError for an unknown key (with a suggestion), a missing one, or a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'The configuration'} must be a mapping, got {values!r}.")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in fields:
            known = [*fields, *(["router"] if "model" in fields else [])]
            raise ConfigError(f"Unknown configuration key {where!r}.{nearest(str(key), known)}")
        arguments[key] = _convert(hints[key], value, where)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in fields.items():
        if name not in arguments and (field.default, field.default_factory) == required:
            raise ConfigError(f"Missing configuration key {f'{path}.{name}' if path else name!r}.")
    return cls(**arguments)


def check_choices(section: object, where: str) -> None:
    """Raise ConfigError for a field of a dataclass that is no number, or none of its `Literal`.

    Called in `__post_init__`, so that sections made in Python are checked as those of files are.
    """
    cls: Any = type(section)
    for name, (kind, is_number) in _checked(cls).items():
        value = getattr(section, name)
        if is_number and isinstance(value, str):
            raise ConfigError(f"{where}.{name} must be a number, got {value!r}.")
        _convert(kind, value, f"{where}.{name}")


def check_choice(value: object, kind: Any, where: str) -> None:
    """Raise ConfigError for a value that is none of a `Literal`."""
    _convert(kind, value, where)


def check_sizes(**sizes: int) -> None:
    """Raise ConfigError for a size below 1, by its name."""
    for name, size in sizes.items():
        if not size >= 1:
            raise ConfigError(f"{name} must be at least 1, got {size}.")


@cache
def _checked(cls: Any) -> dict[str, tuple[Any, bool]]:
    """Return the fields of a dataclass that are a number or a `Literal`, or one or None.

    With the type of each, and whether it is a number.
    """
    found = {}
    for name, kind in get_type_hints(cls).items():
        kinds = {kind, get_origin(kind), *get_args(kind), *map(get_origin, get_args(kind))}
        if Literal in kinds:
            found[name] = (kind, False)
        elif kinds & {int, float} and not kinds & {tuple, str}:
            found[name] = (kind, True)
    return found


def to_mapping(value: Any) -> Any:
    """Return a configuration, or a part of one, as plain dicts and lists for YAML or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    return value


def override(values: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with dotted assignments such as `training.steps=100` applied.

    The right-hand side is YAML, such as `null`, `true`, `[1, 2]` and `1e-3`.
    """
    result: dict[str, Any] = to_mapping(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"Cannot read the override {assignment!r}; write it as a.b=value.")
        *parents, last = key.strip().split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(f"Cannot set {key!r}: {parent!r} is not a section.")
        try:
            section[last] = load_yaml(text)
        except UNREADABLE as error:
            raise ConfigError(f"Cannot read the value of {assignment!r}: {error}") from None
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty mapping."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ConfigError(
                f"The configuration {str(path)!r} is larger than {LARGEST_FILE >> 20} MiB: it is "
                "something else than a configuration."
            )
        values = load_yaml(content.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {str(path)!r}.") from None
    except (OSError, *UNREADABLE) as error:
        raise ConfigError(f"Cannot read the configuration {str(path)!r}: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The configuration {str(path)!r} must be a mapping of sections.")
    return values


def parse_size(text: str, where: str) -> int:
    """Return the bytes of a size like 4GB, 1.5 GiB or 300M; `where` is named in the error."""
    found = _SIZE.fullmatch(text)
    if found is None or found[2].lower() not in _UNITS:
        raise ConfigError(
            f"{where} {text!r} is not a size. Write number and unit: 4GB, 512MB, 1.5GiB "
            "(KB, MB, GB and TB are powers of 1000; KiB, MiB, GiB and TiB of 1024)."
        )
    size = int(float(found[1]) * _UNITS[found[2].lower()])
    if size < 1:
        raise ConfigError(f"{where} {text!r} is less than a byte.")
    return size


def write_yaml(path: Path, config: Any) -> None:
    """Write a configuration as YAML, atomically, keys in the order of the dataclass."""
    replace_file(path, yaml.safe_dump(to_mapping(config), sort_keys=False).encode())


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        rest = [option for option in arguments if option is not type(None)]
        for option in rest[:-1]:
            try:
                return _convert(option, value, where)
            except ConfigError:
                continue
        return _convert(rest[-1], value, where)
    if origin is Literal:
        if value not in arguments:
            hint = nearest(str(value), [str(option) for option in arguments])
            raise ConfigError(f"{where} is {value!r}.{hint}")
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_mapping(kind, value, where)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin in (dict, Mapping) or kind in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}.")
        return dict(value)
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    if kind in (int, float):
        if kind is int and type(value) is int:
            return value
        # YAML 1.1 reads 1e-3 as a string: accept what Python parses as a number.
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if kind is float and math.isfinite(number):
            return number
        if kind is int and number.is_integer():
            return int(number)
    elif isinstance(value, kind):
        return value
    raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}.")
