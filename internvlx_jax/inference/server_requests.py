"""Reads the JSON of OpenAI's chat completions (design: serving.md 2)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internvlx_jax.core.json_text import invalid_text
from internvlx_jax.core.tile_config import MOST_TILES, TileConfig
from internvlx_jax.data.images import ImageBytes
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.data.video_files import VideoFrame
from internvlx_jax.inference.arguments import make_spec
from internvlx_jax.inference.requests import GenerationSpec, Request, Turn
from internvlx_jax.inference.videos import FRAMES, place_video

MOST_STOPS = 16
HIGH_DETAIL_TILES = 12
LONGEST = 2**31 - 1  # max_tokens beyond the room of a slot is shortened to it
DEFAULT_TOKENS = 1024
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

# Returns the bytes of an image URL, or raises RequestError.
ReadImage = Callable[[str, str], ImageBytes]
# Returns so many frames of the video of a URL, or raises RequestError.
ReadVideo = Callable[[str, str, int], Sequence[VideoFrame]]


class RequestError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: of HTTP.
        message: what is wrong, for the client.
        param: the field, such as "messages[0].content"; None for the whole request.
        code: in one word, such as "invalid_image".
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Returns the JSON of the reply."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a client asks for.

    Attributes:
        request: the conversation.
        spec: how it is answered.
        stream: whether the answer is sent in pieces.
        include_usage: whether a stream ends with the token counts.
    """

    request: Request
    spec: GenerationSpec
    stream: bool
    include_usage: bool


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the object of a body. Raises RequestError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return value


def parse_completion(
    body: Mapping[str, Any],
    *,
    model: str,
    tiles: TileConfig,
    max_tiles: int,
    read_image: ReadImage,
    read_video: ReadVideo,
) -> Completion:
    """Returns what a body asks for; unknown fields are ignored.

    Args:
        body: JSON of the request.
        model: the only model that this server has.
        tiles: how the model cuts images.
        max_tiles: most tiles of a request.
        read_image: reads the image of a URL; the second argument names the field.
        read_video: reads frames of the video of a URL; the third argument is their number.

    Raises:
        RequestError: with the field that is wrong.
    """
    asked = body.get("model", model)
    if asked != model:
        shown = json.dumps(asked)[:200]
        raise RequestError(
            f"the model {shown} does not exist; this server has {model!r}",
            "model",
            status=404,
            code="model_not_found",
        )
    fields = _Fields(body)
    if fields.number("n", 1, whole=True) != 1:
        raise RequestError("n must be 1", "n")
    frames = fields.setting("num_frames", max_tiles) or min(FRAMES, max_tiles)
    messages = _Messages(read_image, lambda url, field: read_video(url, field, frames))
    request = messages.request(body.get("messages"))
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise RequestError("stream_options must be an object", "stream_options")
    return Completion(
        request,
        _spec(fields, tiles, messages.details),
        stream=fields.flag("stream"),
        include_usage=bool(stream_options.get("include_usage")),
    )


def _spec(fields: _Fields, tiles: TileConfig, details: set[str]) -> GenerationSpec:
    name = "max_completion_tokens"
    name = name if fields.body.get(name) is not None else "max_tokens"
    tokens = fields.number(name, DEFAULT_TOKENS, whole=True, least=1)
    options: dict[str, Any] = dict(
        max_new_tokens=min(tokens, LONGEST),
        temperature=fields.number("temperature", 0.0, least=0, most=100),
        top_p=fields.number("top_p", 1.0, least=0, most=1) or 1e-9,
        top_k=max(0, fields.number("top_k", 0, whole=True, least=-1, most=LONGEST)),
        repetition_penalty=fields.number("repetition_penalty", 1.0, least=0.01, most=100),
        seed=fields.number("seed", 0, whole=True) % 2**32,
        stop=fields.stops(),
    )
    limit = fields.setting("max_dynamic_patch", MOST_TILES)
    if limit is None and details:
        ranked = ("high", "auto", "low")
        detail = next(rank for rank in ranked if rank in details)
        limit = {"high": max(HIGH_DETAIL_TILES, tiles.max_num), "auto": None, "low": 1}[detail]
    if limit is not None:
        options["max_num"] = limit
    return make_spec(tiles, **options)


class _Fields:
    """Reads single fields of a body; null is as absent."""

    def __init__(self, body: Mapping[str, Any]):
        self.body = body

    def number(
        self,
        name: str,
        default: Any,
        *,
        whole: bool = False,
        least: float | None = None,
        most: float | None = None,
    ) -> Any:
        value = self.body.get(name)
        if value is None:
            return default
        kind = int if whole else (int, float)
        if isinstance(value, float) and whole and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, kind) or value != value:
            article = "a whole number" if whole else "a number"
            raise RequestError(f"{name} must be {article}", name)
        if (least is not None and value < least) or (most is not None and value > most):
            bounds = [f"at least {least}"] * (least is not None) + [f"at most {most}"] * (
                most is not None
            )
            raise RequestError(f"{name} must be {' and '.join(bounds)}", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value not in (None, True, False):
            raise RequestError(f"{name} must be true or false", name)
        return bool(value)

    def stops(self) -> tuple[str, ...]:
        value = self.body.get("stop")
        if value is None:
            return ()
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or len(stops) > MOST_STOPS:
            raise RequestError(f"stop must be a string or a list of at most {MOST_STOPS}", "stop")
        for i, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop or invalid_text(stop) is not None:
                raise RequestError("stop must hold texts that are not empty", f"stop[{i}]")
        return tuple(stops)

    def setting(self, name: str, most: int) -> int | None:
        """Returns a whole number of mm_processor_kwargs; None without it."""
        settings = self.body.get("mm_processor_kwargs")
        if settings is None:
            return None
        if not isinstance(settings, dict):
            raise RequestError("mm_processor_kwargs must be an object", "mm_processor_kwargs")
        return _Fields(settings).number(name, None, whole=True, least=1, most=most)


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a message.

    Attributes:
        text: what stands for it in the prompt.
        images: its image, or the frames of its video.
    """

    text: str
    images: tuple[ImageBytes, ...] = ()

    @property
    def is_image(self) -> bool:
        """Whether it is an image and no video."""
        return self.images != () and not isinstance(self.images[0], VideoFrame)


class _Messages:
    """Reads the messages of one request.

    Attributes:
        details: the `detail` of every image.
    """

    def __init__(
        self, read_image: ReadImage, read_video: Callable[[str, str], Sequence[VideoFrame]]
    ):
        self.read_image, self.read_video = read_image, read_video
        self.details: set[str] = set()

    def request(self, messages: Any) -> Request:
        """Returns the conversation; neighbors of one role are joined by a line break."""
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages must be a list that is not empty", "messages")
        read = [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]
        system = [text for role, text, _ in read if role == "system"]
        joined: list[tuple[str, str, tuple[ImageBytes, ...]]] = []
        for role, text, images in read:
            if role == "system":
                continue
            if joined and joined[-1][0] == role:
                _, before, shown = joined.pop()
                text, images = f"{before}\n{text}", (*shown, *images)
            joined.append((role, text, images))
        if not joined or joined[-1][0] != "user":
            raise RequestError("the last message must be one of the user", "messages")
        if joined[0][0] != "user":
            raise RequestError(
                "the first message after the system's must be the user's", "messages"
            )
        (_, prompt, images) = joined[-1]
        history = tuple(
            Turn(asked[1], answer[1], asked[2])
            for asked, answer in zip(joined[:-1:2], joined[1::2], strict=True)
        )
        return Request(
            prompt=prompt,
            images=images,
            history=history,
            system="\n".join(system) if system else None,
        )

    def _message(self, message: Any, where: str) -> tuple[str, str, tuple[ImageBytes, ...]]:
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}", f"{where}.role")
        content, where = message.get("content"), f"{where}.content"
        if content is None and role == "assistant":
            content = ""
        if isinstance(content, str):
            return ROLES[role], _text(content, where), ()
        if not isinstance(content, list):
            raise RequestError(f"{where} must be a text or a list of parts", where)
        parts = [self._part(part, f"{where}[{i}]", role) for i, part in enumerate(content)]
        return ROLES[role], *_placed(parts, where)

    def _part(self, part: Any, where: str, role: str) -> _Part:
        """Returns a text, an image, or the frames of a video."""
        if not isinstance(part, dict):
            raise RequestError(f"{where} must be an object", where)
        kind = part.get("type")
        if kind == "text":
            return _Part(_text(part.get("text"), f"{where}.text"))
        if kind not in ("image_url", "video_url"):
            raise RequestError(
                f"{where}.type must be text, image_url or video_url", f"{where}.type"
            )
        if role != "user":
            raise RequestError("only messages of the user may hold images", where)
        image, where = part.get(kind), f"{where}.{kind}"
        image = {"url": image} if isinstance(image, str) else image
        if not isinstance(image, dict) or not isinstance(image.get("url"), str):
            raise RequestError(f"{where}.url must be a text", f"{where}.url")
        if kind == "video_url":
            frames = tuple(self.read_video(image["url"], f"{where}.url"))
            return _Part(place_video("", 0, len(frames), where)[0].rstrip("\n"), frames)
        detail = image.get("detail") or "auto"
        if detail not in ("low", "auto", "high"):
            raise RequestError(f"{where}.detail must be low, auto or high", f"{where}.detail")
        self.details.add(detail)
        return _Part(IMAGE_PLACEHOLDER, (self.read_image(image["url"], f"{where}.url"),))


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a text", where)
    bad = invalid_text(value)
    if bad is not None:
        raise RequestError(f"{where} is not valid Unicode: {bad}", where)
    return value


def _placed(parts: list[_Part], where: str) -> tuple[str, tuple[ImageBytes, ...]]:
    """Joins the parts of a message; images stand where their parts do.

    A text that has as many "<image>" as there are images says itself where they stand. Videos stand
    where their parts do in any case.

    Returns:
        The text, and images and frames in the order of their placeholders.
    """
    found = sum(part.text.count(IMAGE_PLACEHOLDER) for part in parts if not part.images)
    pictures = [image for part in parts if part.is_image for image in part.images]
    if found and found == len(pictures):
        parts = [part for part in parts if not part.is_image]
        left = iter(pictures)
        images = [
            image
            for part in parts
            for image in part.images or itertools.islice(left, part.text.count(IMAGE_PLACEHOLDER))
        ]
    elif found and any(part.images for part in parts):
        raise RequestError(
            f'{len(pictures)} images but {found} "<image>" in the text; write one for each image, '
            "or none",
            where,
        )
    else:
        images = [image for part in parts for image in part.images]
    return "\n".join(part.text for part in parts), tuple(images)
