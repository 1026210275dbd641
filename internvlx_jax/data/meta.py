"""Meta files: which chat files make up the training data (design: data.md 1 and 16)."""

import dataclasses
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.json_text import decode_json, invalid_text, shown
from internvlx_jax.core.remote import protocol_of
from internvlx_jax.core.tile_config import MOST_TILES, TILE_RULES
from internvlx_jax.data import storage
from internvlx_jax.data.templates import get_template


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """Describes one dataset of a meta file, its paths resolved.

    Its samples come from one of three places: JSONL, ArrayRecord or TFDS.

    Attributes:
        name: key in the meta file.
        root: folder that image paths are joined with.
        annotation: a JSONL chat file, or one JSON array of samples.
        array_record: a path or pattern of ArrayRecord files.
        tfds: a prepared TFDS dataset, "name/config:version".
        split: of the TFDS dataset.
        data_dir: folder of TFDS datasets.
        builder: "module:function" that maps one TFDS example to a sample.
        repeat_time: below 1 the fraction of lines that is used, above 1 how often the list is
            repeated.
        weight: share of the samples in the mixture `weight`.
        length: number of lines that the meta file states; it is only compared.
        max_dynamic_patch: replaces the run's tile maximum.
        conv_style: replaces the run's template.
        tile_rule: replaces the run's tile rule.
        data_augment: whether tiles are compressed by JPEG of random quality.
    """

    name: str
    root: str = ""
    annotation: str | None = None
    array_record: str | None = None
    tfds: str | None = None
    split: str = "train"
    data_dir: str | None = None
    builder: str | None = None
    repeat_time: float = 1
    weight: float | None = None
    length: int | None = None
    max_dynamic_patch: int | None = None
    conv_style: str | None = None
    tile_rule: str | None = None
    data_augment: bool = False


_FIELDS = {
    field.name: field.type for field in dataclasses.fields(DatasetEntry) if field.name != "name"
}
_SOURCES = ("annotation", "array_record", "tfds")


def read_meta(path: str | os.PathLike) -> list[DatasetEntry]:
    """Returns the datasets of a meta file, in its order. Unknown fields are a warning.

    Relative paths are tried from the working directory, then from the meta file's folder.

    Raises:
        FileNotFoundError: the meta file, or a file or folder that it names, does not exist.
        ConfigError: names the meta file, the dataset and the field that cannot be used.
    """
    path = os.fspath(path)
    try:
        with storage.open_binary(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"meta file {path} does not exist. Check the path.") from None
    try:
        meta = decode_json(data, unique_keys=True)
    except ValueError as error:
        raise ConfigError(f"meta file {path} is {error}. Correct the file.") from None
    bad = invalid_text(meta)
    if bad is not None:
        raise ConfigError(f"meta file {path}: a text is not valid Unicode: {bad}. Correct it.")
    if not isinstance(meta, dict) or not all(isinstance(fields, dict) for fields in meta.values()):
        raise ConfigError(
            f'{path}: must map dataset names to objects, {{"name": {{"annotation": ...}}}}.'
        )
    if not meta:
        raise ConfigError(f'{path}: names no datasets; add {{"name": {{"annotation": ...}}}}.')
    for name in meta:
        if not name.strip() or not name.isprintable():
            raise ConfigError(
                f"{path}: a dataset is called {shown(name)}; logs and messages need a printable "
                "name. Rename it."
            )
    folder = os.path.dirname(path)
    return [
        _entry(folder, f'{path} dataset "{name}"', name, fields) for name, fields in meta.items()
    ]


def _entry(folder: str, where: str, name: str, fields: dict) -> DatasetEntry:
    for key in sorted(fields.keys() - _FIELDS.keys()):
        warnings.warn(
            f'{where}: unknown field "{key}" is ignored.{did_you_mean(key, _FIELDS)}', stacklevel=3
        )
    fields = {key: fields[key] for key in _FIELDS if fields.get(key) is not None}
    for key in fields:
        if _FIELDS[key] in (str, str | None) and not isinstance(fields[key], str):
            raise ConfigError(f'{where}: "{key}" must be a text, got {shown(fields[key])}.')
    _resolve_source(folder, where, fields)
    if fields.setdefault("root", ""):
        fields["root"] = _resolve(folder, where, "root", fields["root"], storage.is_folder)
    repeat = fields.get("repeat_time", 1)
    if not _is_number(repeat) or repeat < 0 or (repeat > 1 and repeat != int(repeat)):
        raise ConfigError(
            f'{where}: "repeat_time" must be below 1 or a whole number, got {shown(repeat)}.'
        )
    weight = fields.get("weight", 1)
    if not _is_number(weight) or weight <= 0:
        raise ConfigError(f'{where}: "weight" must be a number above 0, got {shown(weight)}.')
    limit = fields.get("max_dynamic_patch", 1)
    if not _is_count(limit) or not 1 <= limit <= MOST_TILES:
        raise ConfigError(
            f'{where}: "max_dynamic_patch" must be a whole number above 0, got {shown(limit)}; '
            f"at most {MOST_TILES}."
        )
    length = fields.get("length")
    if length is not None and not _is_count(length):
        raise ConfigError(f'{where}: "length" must be a whole number, got {shown(length)}.')
    rule = fields.get("tile_rule", "edge")
    if rule not in TILE_RULES:
        raise ConfigError(
            f'{where}: "tile_rule" must be one of {", ".join(TILE_RULES)}, got {shown(rule)}.'
        )
    try:
        get_template(fields.get("conv_style", "internlm2-chat"))
    except ValueError as error:
        raise ConfigError(f'{where}: "conv_style": {error}') from error
    if not isinstance(fields.get("data_augment", False), bool):
        raise ConfigError(
            f'{where}: "data_augment" must be true or false, got {shown(fields["data_augment"])}.'
        )
    return DatasetEntry(name=name, **fields)


def _resolve_source(folder: str, where: str, fields: dict) -> None:
    """Resolves the paths of the one source of a dataset, in place."""
    given = [key for key in _SOURCES if key in fields]
    if len(given) > 1:
        raise ConfigError(f"{where}: has {' and '.join(given)}; keep one of them.")
    if given == ["array_record"]:

        def exists(pattern: str) -> bool:
            return bool(storage.matching(pattern))

        if protocol_of(fields["array_record"]) not in ("", "gs"):
            raise ConfigError(
                f'{where}: "array_record" must be local files or gs://, got '
                f"{fields['array_record']}. Copy them to one of these."
            )
        fields["array_record"] = _resolve(
            folder, where, "array_record", fields["array_record"], exists
        )
    elif given == ["tfds"]:
        if "builder" not in fields or fields["builder"].count(":") != 1:
            raise ConfigError(
                f'{where}: "tfds" needs "builder": "module:function", which maps an example to a '
                f"sample; got {fields.get('builder')!r}."
            )
        if "data_dir" in fields:
            fields["data_dir"] = _resolve(
                folder, where, "data_dir", fields["data_dir"], storage.is_folder
            )
    else:
        if not fields.get("annotation", "").endswith(("jsonl", "json")):
            raise ConfigError(
                f'{where}: "annotation" must name a .jsonl file, got '
                f"{shown(fields.get('annotation'))}; a .json file that is one array is read, too."
            )
        fields["annotation"] = _resolve(
            folder, where, "annotation", fields["annotation"], storage.is_file
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_number(value)


def _resolve(folder: str, where: str, key: str, value: str, exists: Callable[[str], bool]) -> str:
    candidates = list(dict.fromkeys([value, storage.join(folder, value)]))
    for candidate in candidates:
        if exists(candidate):
            return candidate if storage.is_url(candidate) else str(Path(candidate))
    raise FileNotFoundError(
        f'{where}: "{key}" does not exist; tried {" and ".join(candidates)}. '
        "Relative paths count from the working directory, then from the meta file's folder."
    )
