"""Meta files: which chat files make up the training data (spec: data.md 1)."""

import dataclasses
import json
import os
import warnings
from pathlib import Path

from internvlx_jax.data.errors import did_you_mean
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tiles import TILE_RULES
from internvlx_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a meta file, its paths resolved.

    Attributes
      name: key in the meta file.
      root: folder that image paths are joined with.
      annotation: the JSONL chat file.
      repeat_time: below 1 the fraction of lines that is used, above 1 how often the list is repeated.
      length: number of lines as the meta file states it, only compared.
      max_dynamic_patch, conv_style, tile_rule: replace the run's tile maximum, template and tile rule.
      data_augment: JPEG re-encoding of tiles; read_meta refuses it for now.
    """

    name: str
    root: str
    annotation: str
    repeat_time: float = 1
    length: int | None = None
    max_dynamic_patch: int | None = None
    conv_style: str | None = None
    tile_rule: str | None = None
    data_augment: bool = False


_FIELDS = [field.name for field in dataclasses.fields(DatasetEntry) if field.name != "name"]


def read_meta(path: str | os.PathLike) -> list[DatasetEntry]:
    """The datasets of a meta file, in its order. Unknown fields are a warning.

    Relative paths are tried from the working directory, then from the meta file's folder.
    Raises FileNotFoundError and ValueError naming the meta file, the dataset and the field.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"meta file {path} does not exist. Check the path.") from None
    except ValueError as error:
        raise ConfigError(f"meta file {path} is not JSON: {error}. Correct it there.") from error
    if not isinstance(meta, dict) or not all(isinstance(fields, dict) for fields in meta.values()):
        raise ConfigError(f'{path}: must map dataset names to objects, {{"name": {{"annotation": ...}}}}.')
    return [_entry(path.parent, f'{path} dataset "{name}"', name, fields) for name, fields in meta.items()]


def _entry(folder: Path, where: str, name: str, fields: dict) -> DatasetEntry:
    for key in sorted(fields.keys() - set(_FIELDS)):
        warnings.warn(f'{where}: unknown field "{key}" is ignored.{did_you_mean(key, _FIELDS)}', stacklevel=3)
    fields = {key: fields[key] for key in _FIELDS if fields.get(key) is not None}
    if not isinstance(fields.get("annotation"), str) or not fields["annotation"].endswith("jsonl"):
        raise ConfigError(f'{where}: "annotation" must name a .jsonl file, got {fields.get("annotation")!r}.')
    if not isinstance(fields.setdefault("root", ""), str):
        raise ConfigError(f'{where}: "root" must be a folder, got {fields["root"]!r}.')
    for key in ("root", "annotation"):
        fields[key] = _resolve(folder, where, key, fields[key])
    repeat = fields.get("repeat_time", 1)
    if not _is_number(repeat) or repeat < 0 or (repeat > 1 and repeat != int(repeat)):
        raise ConfigError(f'{where}: "repeat_time" must be below 1 or a whole number, got {repeat!r}.')
    limit = fields.get("max_dynamic_patch", 1)
    if not isinstance(limit, int) or limit < 1:
        raise ConfigError(f'{where}: "max_dynamic_patch" must be a whole number above 0, got {limit!r}.')
    rule = fields.get("tile_rule", "edge")
    if rule not in TILE_RULES:
        raise ConfigError(f'{where}: "tile_rule" must be one of {", ".join(TILE_RULES)}, got {rule!r}.')
    try:
        get_template(fields.get("conv_style", "internlm2-chat"))
    except ValueError as error:
        raise ConfigError(f'{where}: "conv_style": {error}') from error
    if fields.get("data_augment", False) is not False:
        raise ConfigError(f'{where}: "data_augment" is not supported yet. Set it to false.')
    return DatasetEntry(name=name, **fields)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _resolve(folder: Path, where: str, key: str, value: str) -> str:
    if value.startswith("s3://"):
        raise ConfigError(f'{where}: "{key}" is {value}; s3:// cannot be read. Copy the files to a disk.')
    candidates = [Path(value), folder / value]
    for candidate in candidates:
        if candidate.is_dir() if key == "root" else candidate.is_file():
            return str(candidate)
    raise FileNotFoundError(
        f'{where}: "{key}" does not exist; tried {" and ".join(map(str, dict.fromkeys(candidates)))}. '
        "Relative paths count from the working directory, then from the meta file's folder."
    )
