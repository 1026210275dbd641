"""Records as other tools write them -> records in InternVL's form (design: data.md 2).

What is read: ms-swift's `messages` with `images`, LLaMA-Factory's ShareGPT form with `images`,
contents in parts as chat APIs have them. What has a meaning that this package does not give it is
refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvlx_jax.core.errors import SampleError
from internvlx_jax.core.json_text import shown
from internvlx_jax.data.embedded import from_base64
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER

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


def internvl_form(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the record with `image`, `video` and `conversations`.

    Raises:
        SampleError: "json": two fields say the same thing, or one has a meaning that would be lost.
    """
    for name, reason in _REFUSED.items():
        if record.get(name) not in (None, "", [], {}, "[]"):
            raise malformed(f'"{name}" is set, but {reason}')
    if lost := lost_picture(record):
        raise malformed(lost)
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
            raise malformed('"videos" holds several videos; one sample may have one')
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


def malformed(problem: str) -> SampleError:
    """Returns the error of a line whose content is wrong."""
    return SampleError("json", f"{problem}.", "Correct the line, or leave it out.")


def _rename(fields: dict[str, Any], other: str, name: str) -> None:
    """Moves the field `other` to `name`, in place."""
    value = fields.pop(other, None)
    if value in (None, "", []):
        return
    if fields.get(name) not in (None, "", []) and fields[name] != value:
        raise malformed(f'"{name}" and "{other}" are both set; keep one')
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
            raise malformed(f'"bytes" of an image is not base64 ({error})') from None
    given = [each for each in (data, item.get("path"), item.get("url")) if each]
    if not given:
        raise malformed(f'an image is {shown(dict(item))}; it needs "path", "url" or "bytes"')
    return given[0]


def _take_messages(fields: dict[str, Any]) -> None:
    """Turns `messages` and `system` into `conversations`, in place."""
    if fields.get("messages") and fields.get("conversations"):
        raise malformed('"messages" and "conversations" are both set; keep one')
    messages = fields.pop("messages", None) or fields.get("conversations")
    if messages is None:
        found = [name for name in _OTHER_FORMS if name in fields]
        if found:
            raise malformed(
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
            raise malformed('images stand both in the turns and in "image" or "images"; keep one')
        fields["image"] = parts
    system = fields.pop("system", None)
    if system is not None and system != "":
        if turns and isinstance(turns[0], dict) and turns[0].get("from") == "system":
            raise malformed('"system" is set, and the first turn is from system, too; keep one')
        turns.insert(0, {"from": "system", "value": system})
    fields["conversations"] = turns


def _turn(message: Any, images: list[Any]) -> Any:
    """Returns {"from", "value"} of a message; images among its parts are appended to `images`."""
    if not isinstance(message, dict):
        return message
    role = message.get("from", message.get("role"))
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role == "gpt" and message.get("loss") is not None and not message["loss"]:
        raise malformed('an answer has "loss": false, but every answer is trained on')
    if message.get("tool_calls"):
        raise malformed("a message has tool_calls, which are not supported")
    value = message.get("value", message.get("content"))
    if isinstance(value, list):
        value = "".join(_part(part, images) for part in value)
    return {"from": role, "value": value}


def _part(part: Any, images: list[Any]) -> str:
    """Returns the text of one part of a message; an image is its placeholder."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        if IMAGE_PLACEHOLDER in part["text"]:
            raise malformed(f'a part of type text holds "{IMAGE_PLACEHOLDER}"; leave it out')
        return part["text"]
    if kind in ("image", "image_url"):
        value = part.get(kind)
        images.append(_unwrapped(value))
        return f"{IMAGE_PLACEHOLDER}\n"
    raise malformed(f"a part of a message is {shown(part)}; parts are of type text or image")
