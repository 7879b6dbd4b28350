"""Frozen dataclasses as tables of TOML and as flat keys, and back, every value checked."""

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fedcunet.errors import UserError

Scalar = bool | int | float | str
Section = TypeVar("Section")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raises UserError unless low <= value <= high (never for NaN)."""
    if not low <= value <= high:
        bounds = (str(one) if isinstance(one, int) else f"{one:g}" for one in (low, high))
        raise UserError(f"{name}: expected {' to '.join(bounds)}, found {value!r}")


def typed(text: str) -> Scalar:
    """The TOML value that `text` is, or the text itself."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # no TOML, more digits than Python reads, too deep
        return text
    if isinstance(value, float) and not math.isfinite(value):
        return text  # no setting is NaN, but an attack is called so
    return value if isinstance(value, bool | int | float | str) else text


def nested(section: Any) -> dict[str, Any]:
    """A dataclass as tables with kebab-case keys, every value written out."""
    result: dict[str, Any] = {}
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        key = item.name.replace("_", "-")
        result[key] = nested(value) if dataclasses.is_dataclass(value) else value
    return result


def build(
    cls: type[Section], values: Mapping[str, Any], where: str, *, prefix: str = ""
) -> Section:
    """An instance of the dataclass `cls` from tables; what is absent has its default.

    Args:
        cls: a dataclass whose fields are scalars, choices (Literal) or such dataclasses.
        values: as read from TOML.
        where: the file, for messages.
        prefix: of the keys in messages.

    Raises:
        UserError: an unknown key, a wrong type, or what `cls` itself refuses.
    """
    types = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in types or "_" in key:
            known = sorted(field_name.replace("_", "-") for field_name in types)
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean '{prefix}{close[0]}'?" if close else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key '{prefix}{key}'; {hint}")
        if dataclasses.is_dataclass(types[name]):
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: '{key}': expected a table, found {value!r}")
            arguments[name] = build(types[name], value, where, prefix=f"{key}.")
        else:
            arguments[name] = _checked(types[name], value, f"{where}: '{prefix}{key}'")
    try:
        return cls(**arguments)
    except UserError as error:
        if str(error).startswith(where):
            raise
        raise UserError(f"{where}: {error}") from None


def flat(tables: Mapping[str, Any]) -> dict[str, Scalar]:
    """Tables with keys joined by dots."""
    result: dict[str, Scalar] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            result.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            result[key] = value
    return result


def unflat(values: Mapping[str, Scalar], where: str) -> dict[str, Any]:
    """Tables from keys joined by dots. Raises UserError if a key is a value and a table."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        *tables, name = key.split(".")
        table = result
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"{where}: '{part}' is both a value and a table")
        table[name] = value
    return result


def _checked(expected: Any, value: Any, where: str) -> Scalar:
    """`value` if it has the expected type; a whole number passes for a float."""
    if get_origin(expected) is Literal:
        choices = get_args(expected)
        if value not in choices:
            raise UserError(f"{where}: expected one of {', '.join(choices)}, found {value!r}")
        return str(value)
    if expected is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not expected:
        words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UserError(f"{where}: expected {words[expected]}, found {value!r}")
    return expected(value)  # type: ignore[no-any-return]
