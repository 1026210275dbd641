"""Sample records -> samples with checked roles and placeholders (design: data.md 2 and 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from internvlx_jax.core.errors import SampleError, placeholder_mismatch
from internvlx_jax.core.json_text import decode_json, invalid_text, shorten, shown
from internvlx_jax.data import storage
from internvlx_jax.data.embedded import embedded_image
from internvlx_jax.data.record_forms import internvl_form, malformed
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn

Size = tuple[int, int]  # (width, height) in pixels
Image = str | bytes  # a path or URL, or the encoded file itself

_VIDEO_FILES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".flv", ".wmv")


@dataclasses.dataclass(frozen=True)
class ChatSample:
    """Holds one record of a dataset, checked.

    Attributes:
        dataset: name in the meta file.
        line: number of the record in its source, from 1.
        where: its place for messages, such as "receipts/train.jsonl line 41".
        id: the record's own id as text, None without one.
        images: paths joined with the dataset's root, or encoded files; empty for a text sample, and
            for a video until its frames are chosen.
        sizes: width and height of each image as the record states them, None where it does not.
        turns: human and gpt in turn, beginning with human. With images, human turns have one
            "<image>" for each; with a video, the first has one "<video>".
        system: the record's system message, None for the template's.
        video: folder or list of frames, None without a video.
    """

    dataset: str
    line: int
    where: str
    id: str | None
    images: tuple[Image, ...]
    sizes: tuple[Size | None, ...]
    turns: tuple[Turn, ...]
    system: str | None
    video: str | tuple[Image, ...] | None = None

    @property
    def name(self) -> str:
        """Returns "dataset:line"."""
        return f"{self.dataset}:{self.line}"


def parse_sample(
    record: bytes | Mapping[str, Any], *, dataset: str, line: int, where: str, root: str
) -> ChatSample:
    """Checks a record and returns it as a sample (design: data.md 2, 3).

    Args:
        record: a JSON object, as bytes or parsed.
        dataset: name in the meta file.
        line: number of the record in its source, from 1.
        where: its place for messages.
        root: folder that image paths are joined with.

    Raises:
        SampleError: the record cannot be used; the message begins with `where`.
    """
    try:
        return _parse(record, dataset, line, where, root)
    except SampleError as error:
        raise error.at(where) from None


def _parse(
    record: bytes | Mapping[str, Any], dataset: str, line: int, where: str, root: str
) -> ChatSample:
    if isinstance(record, bytes):
        try:
            record = decode_json(record)
        except ValueError as error:
            raise malformed(str(error)) from None
    if not isinstance(record, Mapping):
        raise malformed(f"not a JSON object, but {shown(record)}")
    record = internvl_form(record)
    bad = invalid_text([record.get(name) for name in ("id", "image", "video", "conversations")])
    if bad is not None:
        raise malformed(f"a text is not valid Unicode: {bad}")
    images, sizes = _images(record, root)
    video = _video(record, root)
    system, turns = _conversation(record)
    if video is not None:
        if images:
            raise malformed('a sample has "image" or "video", not both')
        turns = _place_video(turns)
    else:
        single = len(images) == 1 and isinstance(record["image"], Image)
        turns = _place_images(turns, len(images), prefix=single)
    id = record.get("id")
    return ChatSample(
        dataset=dataset,
        line=line,
        where=where,
        id=None if id is None else str(id),
        images=images,
        sizes=sizes,
        turns=tuple(turns),
        system=system,
        video=video,
    )


def _images(
    record: Mapping[str, Any], root: str
) -> tuple[tuple[Image, ...], tuple[Size | None, ...]]:
    """Returns (paths or encoded files, sizes) of the images of a record."""
    image = record.get("image") or []
    if isinstance(image, Image):
        paths, widths, heights = [image], [record.get("width")], [record.get("height")]
    else:
        paths, widths, heights = image, record.get("width_list"), record.get("height_list")
    if not _is_paths(paths):
        raise malformed(f'"image" must be a path or a list of paths, got {shown(image)}')
    return _joined(paths, root), _sizes(widths, heights, len(paths))


def _video(record: Mapping[str, Any], root: str) -> str | tuple[Image, ...] | None:
    video = record.get("video")
    if not video:
        return None
    if isinstance(video, str):
        frames: list[Image] = [video]
    elif _is_paths(video):
        frames = video
    else:
        raise malformed(f'"video" must be a folder or a list of frames, got {shown(video)}')
    if any(isinstance(frame, str) and frame.lower().endswith(_VIDEO_FILES) for frame in frames):
        raise SampleError(
            "missing_decoder",
            "video files are not decoded.",
            'Extract frames to a folder, and name the folder or list the frames under "video".',
        )
    if record.get("clip"):
        raise SampleError(
            "missing_decoder",
            '"clip" gives seconds, which frames do not have.',
            'List the frames of the clip under "video".',
        )
    joined = _joined(frames, root)
    return cast(str, joined[0]) if isinstance(video, str) else joined


def _is_paths(paths: Any) -> bool:
    return isinstance(paths, list) and all(isinstance(path, Image) and path for path in paths)


def _joined(paths: list[Image], root: str) -> tuple[Image, ...]:
    return tuple(path if isinstance(path, bytes) else _place(path, root) for path in paths)


def _place(path: str, root: str) -> Image:
    """Returns the path joined with the root, or the encoded file that the text is."""
    data = embedded_image(path)
    if data is not None:
        return data
    if path.startswith("s3://"):
        raise SampleError(
            "unreadable", f"{shorten(path)} is not a local file.", "Copy the files to a disk."
        )
    return storage.join(root, path)


def _sizes(widths: Any, heights: Any, n_images: int) -> tuple[Size | None, ...]:
    unknown = [None] * n_images
    widths, heights = widths or unknown, heights or unknown
    if (
        isinstance(widths, list)
        and isinstance(heights, list)
        and len(widths) == len(heights) == n_images
    ):
        sizes = tuple(zip(widths, heights, strict=True))
        if all(map(_is_size, sizes)):
            return tuple(None if size == (None, None) else size for size in sizes)
    raise SampleError(
        "size_mismatch",
        "the size fields do not give each image a positive width and height.",
        "Correct width and height (width_list and height_list), or remove them to have the files "
        "read.",
    )


def _is_size(size: tuple) -> bool:
    return all(side is None for side in size) or all(
        type(side) is int and side > 0 for side in size
    )


def _conversation(record: Mapping[str, Any]) -> tuple[str | None, list[Turn]]:
    """Returns (system message or None, turns) with a leading gpt turn dropped."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict)
        and isinstance(turn.get("from"), str)
        and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise malformed('"conversations" must be a list of {"from": ..., "value": ...} with texts')
    turns = [(turn["from"], turn["value"]) for turn in turns]
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else None
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    roles = [role for role, _ in turns]
    if not roles or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        raise SampleError(
            "role_order",
            f"the turns are from {shorten(', '.join(roles)) if roles else 'nobody'}.",
            "They must alternate human, gpt, human, ...; only a system turn and a gpt turn may "
            "come before.",
        )
    return system, turns


def _place_images(turns: list[Turn], n_images: int, *, prefix: bool) -> list[Turn]:
    """Returns turns with one placeholder per image; `prefix` adds the one that is missing.

    A placeholder without an image is an error: the picture would be missing without a word.
    """
    found = sum(text.count(IMAGE_PLACEHOLDER) for role, text in turns if role == "human")
    if prefix and found == 0:
        (role, text), *rest = turns
        return [(role, f"{IMAGE_PLACEHOLDER}\n{text}"), *rest]
    if found != n_images:
        raise placeholder_mismatch(n_images, found)
    return turns


def _place_video(turns: list[Turn]) -> list[Turn]:
    """Returns the turns with one "<video>" and a line end in the first human turn."""
    (role, first), *rest = turns
    videos = sum(text.count(VIDEO_PLACEHOLDER) for role, text in turns if role == "human")
    if videos == 0:
        return [(role, f"{VIDEO_PLACEHOLDER}\n{first}"), *rest]
    if (
        videos > 1
        or VIDEO_PLACEHOLDER not in first
        or any(IMAGE_PLACEHOLDER in text for role, text in turns if role == "human")
    ):
        raise SampleError(
            "placeholder_mismatch",
            'a video needs one "<video>" in the first human turn and no "<image>".',
            'Correct the turns; without any "<video>" it is put in front.',
        )
    return turns
