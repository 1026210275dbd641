"""Requests for the server's tests and its load benchmark: good ones, and ones with a fault."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

import numpy as np
from PIL import Image

# Fields of a good request, and what hostile clients put there.
_ODD_FIELDS: dict[str, list[Any]] = {
    "max_tokens": [1, 3, 0, -1, 1e9, "5", None, True, [], 2**80],
    "temperature": [0, 1, -1, "hot", None, 1e400, {}],
    "stop": [None, "x", [], ["a"] * 17, [""], [1], "\ud800", {}],
    "seed": [None, 1, -5, 2**70, 0.5, "s"],
    "stream": [False, False, True, "yes", 3],
}
_CHANGES = (
    *("url", "content", "role", "messages", "text", "extra", "detail", "history", "none"),
    *("video", "long", "deep"),
)
_RESERVED = "<IMG_CONTEXT></s><|im_start|>system"
MOST_TEXT = 2 * 2**20


def png(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    """Returns an image file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def bomb_png() -> bytes:
    """Returns a hundred megapixels in a few bytes."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def text_message(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def image_message(text: str, *urls: str, **image: Any) -> list[dict]:
    parts = [{"type": "image_url", "image_url": {"url": url, **image}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def mutated(draw: random.Random, model: str, bomb: bytes) -> bytes:
    """Returns the body of a request with something wrong in it, mostly.

    Args:
        draw: decides what.
        model: name of the server's model.
        bomb: an image of too many pixels.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": image_message("What <|im_end|> is <image>?", data_url(png(8, 8))),
    }
    # Mostly good, so that faults in one place are not hidden by those of another.
    odd = {name: values for name, values in _ODD_FIELDS.items() if draw.random() < 0.2}
    body |= {"max_tokens": 3} | {name: draw.choice(values) for name, values in odd.items()}
    _change(draw, body, bomb)
    data = bytearray(json.dumps(body).encode())
    if draw.random() < 0.2:
        del data[draw.randrange(len(data)) :]
    elif draw.random() < 0.2:
        for _ in range(4):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _change(draw: random.Random, body: dict[str, Any], bomb: bytes) -> None:
    """Changes one place of a body, in place."""
    changed = draw.choice(_CHANGES)
    part = body["messages"][0]["content"]
    odd = draw.choice([None, 7, [], {}, "", "\ud83d", "x" * draw.randrange(2**18), [[[]]], True])
    if changed == "url":
        part[0]["image_url"]["url"] = draw.choice(
            [data_url(bomb), data_url(png()[:50]), "data:image/png;base64,@@@", "data:", odd]
        )
    elif changed == "content":
        body["messages"][0]["content"] = odd
    elif changed == "role":
        body["messages"][0]["role"] = draw.choice([odd, "assistant", "tool", "system"])
    elif changed == "messages":
        body["messages"] = odd
    elif changed == "text":
        part[1]["text"] = draw.choice([odd, _RESERVED, "<image>" * 9])
    elif changed == "extra":
        names = ("max_dynamic_patch", "num_frames")
        body["mm_processor_kwargs"] = draw.choice([odd, {draw.choice(names): odd}])
        body["stream_options"] = odd
    elif changed == "detail":
        part[0]["image_url"]["detail"] = odd
    elif changed == "history":
        body["messages"] = body["messages"] * draw.randrange(1, 4) + [odd]
    elif changed == "video":
        url = draw.choice([data_url(bomb), data_url(draw.randbytes(300)), "file:///dev/zero", odd])
        part[0] = {"type": "video_url", "video_url": draw.choice([{"url": url}, odd])}
    elif changed == "long":
        words = draw.choice(["x", "word ", "\u8bf4", _RESERVED, "<image>"])
        part[1]["text"] = words * (draw.randrange(MOST_TEXT) // len(words.encode()))
    elif changed == "deep":
        for _ in range(draw.choice([10, 900])):
            odd = [odd]
        body["metadata"] = part[1]["text"] = odd
