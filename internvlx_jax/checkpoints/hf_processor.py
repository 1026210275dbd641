"""Prompt and tiling of transformers' layout, from the files beside its config.json.

(design: checkpoints.md 5)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.checkpoints.chat_template import find_chat_template
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.core.tile_config import NORMALIZATIONS

_BICUBIC = 3  # the number that Pillow gives it
_TILING = ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch")


@dataclasses.dataclass(frozen=True)
class SideFields:
    """What the files beside config.json say.

    Attributes:
        fields: internvl_chat fields that config.json lacks.
        notes: what was taken from where, for a report.
    """

    fields: Mapping[str, Any]
    notes: tuple[str, ...]


def read_side_fields(
    folder: Path, config: Mapping[str, Any], given: Collection[str] = ()
) -> SideFields:
    """Reads template and tiling of a folder in transformers' layout.

    A field that config.json has or that is given is not read: exports of this project state them in
    config.json.

    Args:
        folder: the checkpoint folder.
        config: its parsed config.json.
        given: internvl_chat fields that replace what the folder says.

    Raises:
        ConfigError: a file is damaged, or asks for something that is not computed here.
    """
    stated = {*config, *given}
    fields: dict[str, Any] = {}
    notes = [f"{name} from --field" for name in sorted(given)]
    if "template" not in stated and (found := find_chat_template(folder)) is not None:
        fields["template"] = found.name
        notes.append(f"template {found.name} from {found.file.name}")
        if found.system_message is not None and "system_message" not in stated:
            fields["system_message"] = found.system_message
            notes.append(f"system message {found.system_message!r} from {found.file.name}")
    if not stated.issuperset(_TILING):
        tiling, read = _read_tiling(folder, config)
        fields |= {name: value for name, value in tiling.items() if name not in stated}
        notes += read
    return SideFields(fields, tuple(notes))


def _read_tiling(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of the image processor's file, with notes; none without such a file."""
    both, alone = folder / "processor_config.json", folder / "preprocessor_config.json"
    # transformers takes the nested section first.
    outer = read_json_object(both)
    section, file = outer.get("image_processor"), both
    if not isinstance(section, Mapping):
        section, file = read_json_object(alone), alone
    if not section:
        return {}, []
    settings = _Settings(file, section)
    settings.expect_internvl(_tile_side(config))
    crops, notes = settings.flag("crop_to_patches", True), []
    names = section.get("processor_class"), outer.get("processor_class")
    if not crops and "InternVLProcessor" in names:
        crops = True
        notes = [
            f"crop_to_patches is false in {file.name}, but InternVLProcessor cuts images all the "
            "same, and so is done here; --field dynamic_image_size=false squashes them"
        ]
    fields = {
        "dynamic_image_size": crops,
        "use_thumbnail": True,
        "min_dynamic_patch": settings.count("min_patches", 1),
        "max_dynamic_patch": settings.count("max_patches", 12),
    }
    if fields["min_dynamic_patch"] > fields["max_dynamic_patch"]:
        raise ConfigError(f"{file}: min_patches is larger than max_patches. Correct one.")
    stated = ", ".join(f"{name} {str(value).lower()}" for name, value in fields.items())
    return fields, [f"{stated} from {file.name}", *notes]


def _tile_side(config: Mapping[str, Any]) -> int | None:
    """Returns the side of a tile that config.json states; None leaves it to its reader."""
    vision = config.get("vision_config")
    side = vision.get("image_size", 448) if isinstance(vision, Mapping) else None
    side = side[0] if isinstance(side, (list, tuple)) and side else side
    return side if isinstance(side, int) else None


class _Settings:
    """The fields of an image processor, with errors that name file and field."""

    def __init__(self, file: Path, fields: Mapping[str, Any]):
        self.file, self.fields = file, fields

    def expect_internvl(self, side: int | None) -> None:
        """Raises ConfigError where pixels are prepared in another way than InternVL's."""
        for field in ("do_resize", "do_rescale", "do_normalize"):
            if not self.flag(field, True):
                raise self._error(field, "only true is computed")
        if self.flag("do_center_crop", False):
            raise self._error("do_center_crop", "only false is computed")
        if self.fields.get("resample") not in (None, _BICUBIC):
            raise self._error("resample", f"only bicubic ({_BICUBIC}) is computed")
        for field, wanted in zip(
            ("image_mean", "image_std"), NORMALIZATIONS["imagenet"], strict=True
        ):
            if not _close(self.fields.get(field), wanted):
                raise self._error(field, f"only ImageNet's {list(wanted)} is computed")
        if not _close(self.fields.get("rescale_factor"), 1 / 255):
            raise self._error("rescale_factor", "only 1/255 is computed")
        size = self.fields.get("size")
        sides = {size.get("height"), size.get("width")} if isinstance(size, Mapping) else {size}
        if size is not None and side is not None and sides != {side}:
            raise self._error(
                "size", f"config.json has vision_config.image_size {side}; correct one of them"
            )

    def flag(self, field: str, default: bool) -> bool:
        value = self.fields.get(field)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(field, "it must be true or false")
        return value

    def count(self, field: str, default: int) -> int:
        value = self.fields.get(field)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._error(field, "it must be a positive integer")
        return value

    def _error(self, field: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.file}: {field} is {self.fields.get(field)!r}; {expected}.")


def _close(value: Any, wanted: float | tuple[float, ...]) -> bool:
    """Whether a field is absent or has the wanted numbers."""
    if value is None:
        return True
    values = value if isinstance(value, list) else [value]
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    return len(values) == len(wanted) and all(
        isinstance(one, (int, float)) and math.isclose(one, other, rel_tol=1e-4)
        for one, other in zip(values, wanted, strict=True)
    )
