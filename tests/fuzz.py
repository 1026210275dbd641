"""Inputs for the fuzzer: valid files, and what may happen to them (tests/test_fuzz.py).

Every draw comes from one `random.Random(seed)`, so that an input is known by its number.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

# Values that a field of any kind may be given.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**70, 0.5, -0.0, 1e999, -1e999, float("nan"), "", " ", "a",
    "0", "none", "<image>", "<image>\n<image>", "</s>", "[UNUSED_TOKEN_141]", "\u2028", "\u0085",
    "nul \0", "\ud83d", "\ufeff", "../..", "/", "/dev/null", "gopher://b/a", "data:,",
    "data:image/png;base64,AAAA", "iVBORw0KGgo=", "x" * 5000, "é" * 300, "<box>", [], {}, [[]],
    [None], [""], ["a", 1], {"a": {}}, {"path": "0.png"}, {"bytes": "AAAA"}, [{"type": "text"}],
)  # fmt: skip
BYTES = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\n", b"\xe2\x80\xa8", b"\xc2\x85",
    b"\x0b", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"\t", b"\\ud83d", b"\\u0000", b"1e999",
    b"NaN", b"9" * 5000, b"[" * 2000,
)  # fmt: skip
FIELDS = (
    "id", "image", "images", "video", "videos", "width", "height", "width_list", "height_list",
    "clip", "conversations", "messages", "system", "tools", "from", "value", "role", "content",
    "loss", "length", "root", "annotation", "repeat_time", "weight", "max_dynamic_patch",
    "conv_style", "tile_rule", "data_augment", "array_record", "tfds", "builder", "question",
    "answer", "question_id", "step", "dataset", "line",
)  # fmt: skip


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Returns a copy of a JSON value with one to three places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _change(rng, value)
    return value


def _change(rng: random.Random, value: Any) -> Any:
    places = list(_places(value))
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(VALUES))
    box, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del box[key]
    elif kind == 1:
        box[key] = [box[key]]
    elif kind == 2 and isinstance(box, dict):
        box[rng.choice(FIELDS)] = copy.deepcopy(box[key])
    elif kind == 3 and isinstance(box, list):
        box.insert(key, copy.deepcopy(box[key]))
    elif kind == 4 and isinstance(box[key], str):
        place = rng.randrange(len(box[key]) + 1)
        odd = str(rng.choice(VALUES))[:50]
        box[key] = box[key][:place] + odd + box[key][place:]
    else:
        box[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _places(value: Any):
    """Yields (container, key) of everything inside a JSON value."""
    if not isinstance(value, (dict, list)):
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Returns bytes cut, repeated, overwritten or put into another encoding."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + data[place + size :]
        elif kind == 2:
            data = data[:place] + data[place : place + size] * 2 + data[place + size :]
        elif kind == 3:
            data = data[:place] + rng.choice(BYTES) + data[place:]
        elif kind == 4:
            data = data[:place] + rng.randbytes(size) + data[place + size :]
        elif kind == 5 and rng.random() < 0.3:
            encoding = rng.choice(("utf-16", "gbk", "utf-8-sig"))
            data = data.decode("utf-8", "replace").encode(encoding, "replace")
        else:
            data = data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", b"")))
    return data


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """Returns JSON text of a value, in one of the ways in which programs write it."""
    text = json.dumps(
        value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, None, None, 1))
    )
    return text.encode("utf-8", "surrogatepass")


def mutated(rng: random.Random, value: Any) -> bytes:
    """Returns the text of a JSON value, its content or its bytes changed, or neither."""
    kind = rng.randrange(5)
    if kind < 3:
        value = mutate_json(rng, value)
    data = json_bytes(rng, value)
    return mutate_bytes(rng, data) if kind in (2, 3) else data


def lines(rng: random.Random, values: list[Any], change: Callable[..., bytes] = mutated) -> bytes:
    """Returns a JSONL file of which some lines are changed, or all of it."""
    texts = [
        change(rng, value).replace(b"\n", b" ") if rng.random() < 0.5 else json_bytes(rng, value)
        for value in values
    ]
    data = b"\n".join(text.replace(b"\n", b" ") for text in texts) + rng.choice((b"\n", b""))
    return mutate_bytes(rng, data) if rng.random() < 0.15 else data
