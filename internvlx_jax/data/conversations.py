"""Sample records -> samples with checked roles and placeholders (design: data.md 2 and 3).

Besides InternVL's form these are read: ms-swift's `messages` with `images`, LLaMA-Factory's
ShareGPT form with `images`, contents in parts as chat APIs have them. What has a meaning that this
package does not give it is refused by name, never ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from internvlx_jax.core.errors import SampleError, placeholder_mismatch
from internvlx_jax.core.json_text import decode_json, invalid_text, shorten, shown
from internvlx_jax.data import storage
from internvlx_jax.data.images import embedded_image, from_base64
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Turn
from internvlx_jax.data.video_files import is_video_file

Size = tuple[int, int]  # (width, height) in pixels
Image = str | bytes  # a path or URL, or the encoded file itself

_ROLES = {"user": "human", "assistant": "gpt"}

# Fields that are read. Any other is listed by `check`.
KNOWN_FIELDS = frozenset(
    {
        *("id", "length", "image", "images", "width", "height", "width_list", "height_list"),
        *("video", "videos", "clip", "conversations", "messages", "system"),
    }
)
# Fields whose meaning would be lost, and what to do about them.
_REFUSED = {
    "audios": "sound is not supported",
    "audio": "sound is not supported",
    "tools": "tool calls are not supported",
    "objects": "boxes stand in the texts, as <ref>name</ref><box>[[x1, y1, x2, y2]]</box>",
    "rejected_response": "pairs of preferences are not trained on",
    "rejected_messages": "pairs of preferences are not trained on",
    "chosen": "pairs of preferences are not trained on",
    "rejected": "pairs of preferences are not trained on",
    "kto_tag": "preferences are not trained on",
}
# Fields that name a picture elsewhere. Here it would be left out without a word.
_PICTURES = tuple(
    f"{name}{end}"
    for name in ("image_path", "img_path", "image_file", "image_url", "img")
    for end in ("", "s")
)
# Other spellings of a conversation, which are named where there is no conversation.
_OTHER_FORMS = ("query", "response", "history", "instruction", "input", "output", "prompt", "text")


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
        video: video file, folder or list of frames; None without a video.
        clip: begin and end, in seconds, of the part of a video file that is meant; None: all of it.
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
    clip: tuple[float, float] | None = None

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
            raise _malformed(str(error)) from None
    if not isinstance(record, Mapping):
        raise _malformed(f"not a JSON object, but {shown(record)}")
    record = _internvl_form(record)
    bad = invalid_text([record.get(name) for name in ("id", "image", "video", "conversations")])
    if bad is not None:
        raise _malformed(f"a text is not valid Unicode: {bad}")
    images, sizes = _images(record, root)
    video, clip = _video(record, root)
    system, turns = _conversation(record)
    if video is not None:
        if images:
            raise _malformed('a sample has "image" or "video", not both')
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
        clip=clip,
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
        raise _malformed(f'"image" must be a path or a list of paths, got {shown(image)}')
    return _joined(paths, root), _sizes(widths, heights, len(paths))


def _video(
    record: Mapping[str, Any], root: str
) -> tuple[str | tuple[Image, ...] | None, tuple[float, float] | None]:
    """Returns the video of a record and the part of it that is meant."""
    video, clip = record.get("video"), record.get("clip") or None
    if not video:
        return None, None
    if isinstance(video, str):
        frames: list[Image] = [video]
    elif _is_paths(video):
        frames = video
    else:
        raise _malformed(
            f'"video" must be a video file, a folder or a list of frames, got {shown(video)}'
        )
    is_file = isinstance(video, str) and is_video_file(video)
    if any(isinstance(frame, str) and is_video_file(frame) for frame in frames) and not is_file:
        raise _malformed('"video" lists a video file; a list holds images, and a sample one video')
    if clip is not None and not is_file:
        raise SampleError(
            "missing_decoder",
            '"clip" gives seconds, which frames do not have.',
            'List the frames of the clip under "video".',
        )
    joined = _joined(frames, root)
    return cast(str, joined[0]) if isinstance(video, str) else joined, _clip(clip)


def _clip(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    numbers = isinstance(clip, list) and all(type(each) in (int, float) for each in clip)
    if not numbers or len(clip) != 2 or not 0 <= clip[0] < clip[1] < float("inf"):
        raise _malformed(f'"clip" must be [begin, end] in seconds, got {shown(clip)}')
    return float(clip[0]), float(clip[1])


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
        raise _malformed('"conversations" must be a list of {"from": ..., "value": ...} with texts')
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


# --- records as other tools write them ------------------------------------------------------------


def _internvl_form(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the record with `image`, `video` and `conversations`.

    Raises:
        SampleError: "json": two fields say the same thing, or one has a meaning that would be lost.
    """
    for name, reason in _REFUSED.items():
        if record.get(name) not in (None, "", [], {}, "[]"):
            raise _malformed(f'"{name}" is set, but {reason}')
    if lost := lost_picture(record):
        raise _malformed(lost)
    fields = dict(record)
    _rename(fields, "images", "image")
    _rename(fields, "videos", "video")
    image = fields.get("image")
    if isinstance(image, list):
        fields["image"] = [_unwrapped(item) for item in image]
    elif isinstance(image, dict):
        fields["image"] = _unwrapped(image)
    videos = fields.get("video")
    if "videos" in record and isinstance(videos, list):
        if len(videos) > 1:
            raise _malformed('"videos" holds several videos; one sample may have one')
        fields["video"] = videos[0] if videos else None
    _take_messages(fields)
    return fields


def lost_picture(record: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a record whose only picture is in a field that is not read.

    A record with a picture in a field that is read may hold its address in other fields, too.
    """
    if any(record.get(name) for name in ("image", "images", "video", "videos")):
        return None
    found = next((name for name in _PICTURES if record.get(name)), None)
    return found and f'"{found}" is set, but pictures are read from "image"; rename it'


def _malformed(problem: str) -> SampleError:
    """Returns the error of a line whose content is wrong."""
    return SampleError("json", f"{problem}.", "Correct the line, or leave it out.")


def _rename(fields: dict[str, Any], other: str, name: str) -> None:
    """Moves the field `other` to `name`, in place."""
    value = fields.pop(other, None)
    if value in (None, "", []):
        return
    if fields.get(name) not in (None, "", []) and fields[name] != value:
        raise _malformed(f'"{name}" and "{other}" are both set; keep one')
    fields[name] = value


def _unwrapped(item: Any) -> Any:
    """Returns the path or the bytes of {"path": ..., "bytes": ...}, any other item as it is."""
    if not isinstance(item, Mapping):
        return item
    data = item.get("bytes")
    if isinstance(data, str) and data:
        try:
            return from_base64(data)
        except ValueError as error:
            raise _malformed(f'"bytes" of an image is not base64 ({error})') from None
    given = [each for each in (data, item.get("path"), item.get("url")) if each]
    if not given:
        raise _malformed(f'an image is {shown(dict(item))}; it needs "path", "url" or "bytes"')
    return given[0]


def _take_messages(fields: dict[str, Any]) -> None:
    """Turns `messages` and `system` into `conversations`, in place."""
    if fields.get("messages") and fields.get("conversations"):
        raise _malformed('"messages" and "conversations" are both set; keep one')
    messages = fields.pop("messages", None) or fields.get("conversations")
    if messages is None:
        found = [name for name in _OTHER_FORMS if name in fields]
        if found:
            raise _malformed(
                f'no "conversations" or "messages", but {", ".join(found)}, which is the form of '
                "another kind of data; write human and gpt turns"
            )
        return
    if not isinstance(messages, list):
        return  # the check of the turns names it
    parts: list[Any] = []
    turns = [_turn(message, parts) for message in messages]
    if parts:
        if fields.get("image"):
            raise _malformed('images stand both in the turns and in "image" or "images"; keep one')
        fields["image"] = parts
    system = fields.pop("system", None)
    if system is not None and system != "":
        if turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
            raise _malformed('"system" is set, and the first turn is from system, too; keep one')
        turns.insert(0, {"from": "system", "value": system})
    fields["conversations"] = turns


def _turn(message: Any, images: list[Any]) -> Any:
    """Returns {"from", "value"} of a message; images among its parts are appended to `images`."""
    if not isinstance(message, dict):
        return message
    role = message.get("from", message.get("role"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role == "gpt" and message.get("loss") is not None and not message["loss"]:
        raise _malformed('an answer has "loss": false, but every answer is trained on')
    if message.get("tool_calls"):
        raise _malformed("a message has tool_calls, which are not supported")
    value = message.get("value", message.get("content"))
    if isinstance(value, list):
        value = "".join(_part(part, images) for part in value)
    return {"from": role, "value": value}


def _part(part: Any, images: list[Any]) -> str:
    """Returns the text of one part of a message; an image is its placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_PLACEHOLDER in part["text"]:
            raise _malformed(f'a part of type text holds "{IMAGE_PLACEHOLDER}"; leave it out')
        return part["text"]
    if kind in ("image", "image_url"):
        value = part.get(kind)
        images.append(_unwrapped(value))
        return f"{IMAGE_PLACEHOLDER}\n"
    raise _malformed(f"a part of a message is {shown(part)}; parts are of type text or image")
