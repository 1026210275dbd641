"""Chat files (JSONL) -> samples with checked roles and placeholders (spec: data.md 2 and 3)."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from typing import Any

from internvlx_jax.data.errors import SampleError, placeholder_mismatch
from internvlx_jax.data.meta import DatasetEntry
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, Turn

Size = tuple[int, int]  # (width, height) in pixels


@dataclasses.dataclass(frozen=True)
class ChatSample:
    """One line of a chat file.

    Attributes
      dataset, source, line: name in the meta file, the JSONL file, the line in it counted from 1.
      id: the line's own id as text, None without one.
      images: paths, joined with the dataset's root; empty for a text sample.
      sizes: of each image as the line states it, None where it does not.
      turns: human and gpt in turn, beginning with human; with images, one "<image>" for each in human turns.
      system: the line's system message, None for the template's.
    """

    dataset: str
    source: str
    line: int
    id: str | None
    images: tuple[str, ...]
    sizes: tuple[Size | None, ...]
    turns: tuple[Turn, ...]
    system: str | None

    @property
    def where(self) -> str:
        return f"{self.source} line {self.line}"


def read_chat_file(
    entry: DatasetEntry, *, on_bad: Callable[[int, SampleError], None] | None = None
) -> list[ChatSample]:
    """The samples of a dataset, in the order of the file, cut or repeated by its `repeat_time`.

    A bad line raises SampleError that names it, or is passed to on_bad(line, error) once and left out.
    Empty lines do not count. A number of lines other than the entry's `length` is a warning.
    """
    with open(entry.annotation, "rb") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    if entry.length not in (None, len(lines)):
        warnings.warn(
            f'{entry.annotation} has {len(lines)} lines, but the meta file gives dataset "{entry.name}" the '
            f'"length" {entry.length}. The real number is used; correct the field.',
            stacklevel=2,
        )
    if entry.repeat_time < 1:
        lines = lines[: int(len(lines) * entry.repeat_time)]
    samples = []
    for number, line in lines:
        try:
            samples.append(_parse(line, entry, number))
        except SampleError as error:
            error = error.at(f"{entry.annotation} line {number}")
            if on_bad is None:
                raise error from None
            on_bad(number, error)
    return samples * max(1, int(entry.repeat_time))


def _parse(line: bytes, entry: DatasetEntry, number: int) -> ChatSample:
    """One line of the file of `entry`; its errors do not name the line yet."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise _malformed(f"not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise _malformed("not a JSON object")
    images, sizes = _images(record, entry.root)
    system, turns = _conversation(record)
    if images:
        turns = _place_images(turns, len(images), prefix=isinstance(record["image"], str))
    id = record.get("id")
    return ChatSample(
        dataset=entry.name,
        source=entry.annotation,
        line=number,
        id=None if id is None else str(id),
        images=images,
        sizes=sizes,
        turns=tuple(turns),
        system=system,
    )


def _malformed(problem: str) -> SampleError:
    return SampleError("json", f"{problem}.", "Correct the line, or leave it out.")


def _images(record: dict[str, Any], root: str) -> tuple[tuple[str, ...], tuple[Size | None, ...]]:
    """(paths, sizes) of the images of a line."""
    if record.get("video"):
        raise SampleError(
            "missing_decoder", "video samples are not supported yet.",
            'Leave the line out, or list its frames as images under "image".',
        )  # fmt: skip
    image = record.get("image") or []
    if isinstance(image, str):
        paths, widths, heights = [image], [record.get("width")], [record.get("height")]
    else:
        paths, widths, heights = image, record.get("width_list"), record.get("height_list")
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise _malformed(f'"image" must be a path or a list of paths, got {image!r}')
    for path in paths:
        if path.startswith("s3://"):
            raise SampleError("unreadable", f"{path} is not a local file.", "Copy the files to a disk.")
    return tuple(os.path.join(root, path) for path in paths), _sizes(widths, heights, len(paths))


def _sizes(widths: Any, heights: Any, n_images: int) -> tuple[Size | None, ...]:
    unknown = [None] * n_images
    widths, heights = widths or unknown, heights or unknown
    if isinstance(widths, list) and isinstance(heights, list) and len(widths) == len(heights) == n_images:
        sizes = tuple(zip(widths, heights, strict=True))
        if all(map(_is_size, sizes)):
            return tuple(None if size == (None, None) else size for size in sizes)
    raise SampleError(
        "size_mismatch", "the size fields do not give each image a positive width and height.",
        "Correct width and height (width_list and height_list), or remove them to have the files read.",
    )  # fmt: skip


def _is_size(size: tuple) -> bool:
    return all(side is None for side in size) or all(type(side) is int and side > 0 for side in size)


def _conversation(record: dict[str, Any]) -> tuple[str | None, list[Turn]]:
    """(system message or None, turns) with a leading gpt turn dropped."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise _malformed('"conversations" must be a list of {"from": ..., "value": ...} with texts')
    turns = [(turn["from"], turn["value"]) for turn in turns]
    try:
        "".join(text for _, text in turns).encode()
    except UnicodeEncodeError as error:
        raise _malformed(f"a text is not valid Unicode: {error}") from error
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not roles or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        raise SampleError(
            "role_order", f"the turns are from {', '.join(roles) or 'nobody'}.",
            "They must alternate human, gpt, human, ...; only a system turn and a gpt turn may come before.",
        )  # fmt: skip
    return system, turns


def _place_images(turns: list[Turn], n_images: int, *, prefix: bool) -> list[Turn]:
    """The turns with one placeholder for each image; `prefix` adds the missing one of a single image."""
    found = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "human")
    if prefix and found == 0:
        (role, text), *rest = turns
        return [(role, f"{IMAGE_PLACEHOLDER}\n{text}"), *rest]
    if found != n_images:
        raise placeholder_mismatch(n_images, found)
    return turns
