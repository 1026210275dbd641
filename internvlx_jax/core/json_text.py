r"""JSON as files hold it, read and written in one way everywhere.

Text is UTF-8. A line ends at "\n" and nowhere else: str.splitlines would also cut at U+0085, U+2028
and other separators, which JSON allows inside texts. Python's json accepts half of a surrogate
pair, which no file, terminal or tokenizer can take; readers refuse it, and writers escape it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError

BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
SHOWN = 80  # characters of a value that a message repeats


def decode_json(data: bytes, *, unique_keys: bool = False) -> Any:
    """Reads JSON.

    Args:
        data: the whole text; a byte order mark in front of UTF-8 does not count.
        unique_keys: whether two fields of one name in an object are refused; json takes the last.

    Raises:
        ValueError: says what is wrong and what to do, without the place.
    """
    text = decode_text(data)
    try:
        return json.loads(text, object_pairs_hook=_unique if unique_keys else None)
    except RecursionError:
        raise ValueError("not valid JSON: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None


def decode_text(data: bytes) -> str:
    """Decodes UTF-8. Raises ValueError that names the first byte that is none."""
    if data.startswith(_UTF16):
        raise ValueError("UTF-16 text; save the file as UTF-8")
    data = data.removeprefix(BOM)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: byte {error.start} is 0x{data[error.start]:02x}; save the file as UTF-8"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f'not unambiguous: "{shorten(name)}" stands twice; rename one')
        fields[name] = value
    return fields


def invalid_text(value: Any) -> str | None:
    """Returns the part of a JSON value that is no valid Unicode, shortened; None if all is."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return f"{shorten(value)} (half of a surrogate pair at {error.start})"
        return None
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(parts, list):
        return None
    return next((bad for part in parts if (bad := invalid_text(part)) is not None), None)


def shorten(value: Any, most: int = SHOWN) -> str:
    """Returns a value as messages repeat it: at most `most` characters, printable everywhere."""
    text = value if isinstance(value, str) else repr(value)
    cut = text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"
    return cut.encode("utf-8", "backslashreplace").decode()


def shown(value: Any) -> str:
    """Returns a value as Python writes it, shortened: texts have quotation marks."""
    return shorten(repr(value))


def encode_line(value: Any) -> bytes:
    """Returns one line of a JSONL file; half of a surrogate pair is written as its escape."""
    return encode_text(json.dumps(value, ensure_ascii=False)) + b"\n"


def encode_text(text: str) -> bytes:
    """Returns UTF-8; half of a surrogate pair becomes its escape, which JSON reads back."""
    return text.encode("utf-8", "backslashreplace")


def complete_lines(data: bytes) -> list[bytes]:
    """Returns the lines that end; what comes behind the last end is still being written."""
    return data.split(b"\n")[:-1]


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (number from 1, line) of the lines that are not empty, without byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE line N", JSON value) for each line that is not empty.

    A file that is one JSON array gives ("FILE record N", element).

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        try:
            value = decode_json(line)
        except ValueError as error:
            elements = _array(path) if line.lstrip().startswith(b"[") else None
            if number > 1 or elements is None:
                raise ConfigError(f"{where}: {error}; correct the line") from None
            yield from elements
            return
        if number == 1 and isinstance(value, list):  # the same on one line
            yield from _array(path) or ()
            return
        yield where, value


def _array(path: Path) -> list[tuple[str, Any]] | None:
    """Returns the elements of a file that is one JSON array; None if it is not."""
    try:
        elements = decode_json(path.read_bytes())
    except ValueError:
        return None
    return [(f"{path} record {number}", element) for number, element in enumerate(elements, 1)]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, text) of the lines of a text file that are not empty.

    Raises:
        ConfigError: the file is not UTF-8; names the line.
    """
    for number, line in read_lines(path):
        try:
            yield number, decode_text(line).rstrip("\r\n")
        except ValueError as error:
            raise ConfigError(f"{path} line {number}: {error}") from None


def read_json_file(path: Path, *, remedy: str) -> Any:
    """Reads a file that is one JSON value.

    Args:
        path: the file.
        remedy: what to do about a damaged one, for the message.

    Raises:
        OSError: the file cannot be read.
        ConfigError: it is not JSON.
    """
    try:
        return decode_json(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is {error}; {remedy}") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object; without the file, the object is empty.

    Raises:
        ConfigError: the file is not JSON, or holds no object.
    """
    if not path.is_file():
        return {}
    value = read_json_file(path, remedy="fetch it again")
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object; fetch it again")
    return value
