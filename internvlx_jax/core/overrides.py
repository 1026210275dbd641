"""Run configs: short Python files that make nested frozen dataclasses.

A file defines `get_config`. `--set a.b=c` changes fields of what it returns, and the result goes to
JSON and back.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import re
import runpy
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import invalid_text, shorten

T = TypeVar("T")


def load_config_file(source: str | Path) -> Any:
    """Returns the config that a file's `get_config` function makes.

    Args:
        source: Path of a Python file. Text after `.py:` passes keyword arguments, so that one
            file serves several models: `configs/hd_finetune.py:size=8b,lvtc=paper` calls
            `get_config(size="8b", lvtc="paper")`. Values are written as after `--set` and are
            checked against the annotations of the parameters.

    Raises:
        ConfigError: The file or the function is missing, or an argument does not fit.
    """
    stem, colon, arguments = str(source).partition(".py:")
    path = Path(stem + ".py") if colon else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")])
        raise ConfigError(f"--config {path}: no such file{_did_you_mean(near)}")
    get_config = _run(path).get("get_config")
    if not callable(get_config):
        raise ConfigError(f"--config {path}: the file defines no get_config()")
    return get_config(**_arguments(get_config, arguments, f"--config {path}"))


def _run(path: Path) -> dict[str, Any]:
    """Returns what a config file defines. Raises ConfigError that names its line."""
    try:
        return runpy.run_path(str(path))
    except ConfigError:
        raise
    except Exception as error:  # whatever the user's own code raises
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
        place = f" line {line}" if line else ""
        raise ConfigError(
            f"--config {path}{place}: {type(error).__name__}: {shorten(str(error))}"
        ) from error


def _arguments(function: Callable, text: str, full: str) -> dict[str, Any]:
    """Returns the keyword arguments that `name=value,...` spells out for `function`."""
    signature = inspect.signature(function).replace(return_annotation=inspect.Signature.empty)
    hints = typing.get_type_hints(function)
    shown = f"{function.__name__}{signature}"
    values = {}
    # A comma separates arguments only in front of the next name, so that lists can be values.
    for argument in re.split(r",(?=\w+=)", text) if text else ():
        name, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{full}: expected name=value after the colon, got {argument!r}")
        if name not in signature.parameters:
            raise ConfigError(
                f"{full}: {shown} has no parameter {name!r}{_nearest(name, signature.parameters)}"
            )
        hint = hints.get(name, Any)
        parsed = _parse(value, hint)
        values[name] = parsed if hint is Any else _coerce(parsed, hint, f"{full}: {name}")
    try:
        signature.bind(**values)
    except TypeError as error:
        raise ConfigError(f"{full}: {shown}: {error}; add it after the colon") from error
    return values


def override(config: T, settings: Iterable[str]) -> T:
    """Applies `a.b=value` settings.

    All of them are applied before the result is checked, so that fields can change together.

    Raises:
        ConfigError: A field is unknown or a value does not fit; the message names the nearest
            known field.
    """
    data = to_dict(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise ConfigError(
                f"--set {shorten(setting)}: expected field=value, e.g. optimizer.learning_rate=1e-4"
            )
        bad = invalid_text(setting)
        if bad is not None:
            raise ConfigError(f"--set {bad}: not valid Unicode; write it in UTF-8")
        _set(type(config), data, path.split("."), text, f"--set {path}")
    return from_dict(type(config), data)


def to_dict(config: Any) -> Any:
    """Turns nested dataclasses into what JSON can hold."""
    if dataclasses.is_dataclass(config):
        return {
            field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)
        }
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Undoes `to_dict`, checked against the types of the fields.

    Args:
        cls: The dataclass to make.
        data: Fields by name.
        path: Where `data` stands in the whole config, for messages.

    Raises:
        ConfigError: A field is unknown or a value does not fit.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(
            f"{path or cls.__name__}: expected fields of {cls.__name__}, got {data!r}"
        )
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise ConfigError(
                f"{_join(path, name)}: {cls.__name__} has no such field{_nearest(name, hints)}"
            )
    values = {name: _coerce(value, hints[name], _join(path, name)) for name, value in data.items()}
    return _build(cls, values, path)


def with_defaults(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the fields that stored ones lack, at their defaults: an earlier version had fewer.

    Args:
        cls: The dataclass that `data` are fields of.
        data: What `to_dict` gave, of any version; unknown fields are kept.
    """
    filled, hints = dict(data), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name not in data:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is not dataclasses.MISSING:
                filled[field.name] = to_dict(default)
            continue
        inner, value = _required(hints[field.name]), data[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
            filled[field.name] = with_defaults(typing.cast(type, inner), value)
        elif typing.get_origin(inner) is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(inner)[0]
            if dataclasses.is_dataclass(item):
                filled[field.name] = [
                    with_defaults(typing.cast(type, item), each)
                    if isinstance(each, Mapping)
                    else each
                    for each in value
                ]
    return filled


def _set(cls: type, data: dict[str, Any], keys: list[str], text: str, full: str) -> None:
    hints = typing.get_type_hints(cls)
    key, *rest = keys
    if key not in hints:
        raise ConfigError(f"{full}: {cls.__name__} has no field {key!r}{_nearest(key, hints)}")
    if not rest:
        data[key] = to_dict(_coerce(_parse(text, hints[key]), hints[key], full))
        return
    if data.get(key) is None and dataclasses.is_dataclass(_required(hints[key])):
        data[key] = {}  # an optional part of the config, begun field by field
    if isinstance(data[key], dict):
        _set(_required(hints[key]), data[key], rest, text, full)
    else:
        raise ConfigError(f"{full}: {key!r} is {data[key]!r}, it has no fields")


def _required(hint: Any) -> Any:
    """Returns `X` for `X | None`, any other hint as it is."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    (inner,) = (arg for arg in typing.get_args(hint) if arg is not type(None))
    return inner


def _build(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    try:
        return cls(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or cls.__name__}: {error}") from error


def _parse(text: str, hint: Any) -> Any:
    """Reads a command-line value.

    Text stays text where the field takes text, and becomes a literal elsewhere; none, true and
    false may be written in any case.
    """
    required = _required(hint)
    if hint is not required and text.lower() == "none":
        return None
    if required is str or text in typing.get_args(required):
        return text
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _coerce(value: Any, hint: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(value, _required(hint), path)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(
                f"{path}: {value!r} is not one of {', '.join(map(repr, args))}"
                f"{_nearest(str(value), [str(arg) for arg in args])}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{path}: expected a list, got {value!r}")
        return tuple(_coerce(item, args[0], f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, path)
    accepted = (int, float) if hint is float else (hint,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{path}: expected {hint.__name__}, got {value!r}")
    return hint(value)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return _did_you_mean(near) if near else f"; known: {', '.join(known) or 'none'}"


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
