"""Questions, and question files with one JSON object per line (design: evaluation.md 5)."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import decode_json, invalid_text, read_lines, shown
from internvlx_jax.data.embedded import embedded_image
from internvlx_jax.data.images import ImageBytes, ImageSource
from internvlx_jax.data.record_forms import lost_picture
from internvlx_jax.inference.requests import Request


@dataclasses.dataclass(frozen=True)
class Question:
    """One sample of a benchmark.

    Attributes:
        where: file and line, for messages.
        images: paths, or files inside other files; none for a text question.
        id: its id in the data.
        text: the question itself.
        answers: all accepted answers.
        hint: text that a multiple-choice question puts first.
        options: texts of the options by letter, in order.
        fields: everything else that metrics and output files need; for a TSV file all columns but
            the image.
        prompt: what the model is asked, set by the protocol.
    """

    where: str
    id: str | int
    images: tuple[ImageSource, ...]
    text: str
    answers: tuple[str, ...]
    hint: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt: str = ""

    @property
    def request(self) -> Request:
        """What the model is asked."""
        return Request(prompt=self.prompt, images=self.images, where=self.where)


def read_questions(
    path: Path, image_root: Path | None = None, limit: int | None = None
) -> list[Question]:
    """Reads a question file.

    Each line has `question`, `answer` (a text or a list of texts), and optionally `image` (a path,
    an image in base64 or as a data: URL, or a list of them; `images` is the same) and
    `question_id`. Other fields are a warning, once.

    Args:
        path: the file.
        image_root: folder of the image paths; the folder of the file by default.
        limit: read only the first lines.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line cannot be used; the message names file, line and field.
    """
    root = path.parent if image_root is None else image_root
    questions: dict[str | int, Question] = {}
    unknown: Counter[str] = Counter()
    for where, fields in itertools.islice(read_jsonl(path), limit):
        if isinstance(fields, dict):
            unknown.update(fields.keys() - _FIELDS)
        question = _question(fields, where, root, len(questions))
        if question.id in questions:
            raise ConfigError(
                f"{question.where}: question_id {question.id!r} is also in "
                f"{questions[question.id].where}; give each question its own"
            )
        questions[question.id] = question
    if not questions:
        raise ConfigError(f"{path}: no questions in it")
    if unknown:
        listed = ", ".join(f"{shown(name)} ({n})" for name, n in sorted(unknown.items()))
        warnings.warn(
            f"{path}: fields that are not read, with the number of their questions: {listed}",
            stacklevel=2,
        )
    return list(questions.values())


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE line N", JSON value) for each line that is not empty.

    A file that is one JSON array gives ("FILE record N", element).

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"question file {path} does not exist")
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


_FIELDS = frozenset({"question", "answer", "image", "images", "question_id"})


def _question(fields: Any, where: str, root: Path, index: int) -> Question:
    try:
        text, answer = fields["question"], fields["answer"]
    except (KeyError, TypeError):
        found = f", found {', '.join(map(shown, fields))}" if isinstance(fields, dict) else ""
        raise ConfigError(f'{where}: needs the fields "question" and "answer"{found}') from None
    answers = answer if isinstance(answer, list) else [answer]
    if fields.get("image") and fields.get("images"):
        raise ConfigError(f'{where}: "image" and "images" are both set; keep one')
    if lost := lost_picture(fields):
        raise ConfigError(f"{where}: {lost}")
    image = fields.get("image") or fields.get("images") or []
    images = image if isinstance(image, list) else [image]
    texts = [text, *answers, *images]
    if not answers or not all(isinstance(item, str) for item in texts):
        raise ConfigError(
            f'{where}: "question" must be a text, "answer" and "image" a text or a list of texts'
        )
    id = fields.get("question_id", index)
    if not isinstance(id, (str, int)) or isinstance(id, bool):
        raise ConfigError(
            f'{where}: "question_id" must be a text or a whole number, got {shown(id)}'
        )
    bad = invalid_text([*texts, str(id)])
    if bad is not None:
        raise ConfigError(f"{where}: a text is not valid Unicode: {bad}; correct the line")
    sources = tuple(_image(item, f"{where} image {i}", root) for i, item in enumerate(images, 1))
    return Question(where, id, sources, text, tuple(answers))


def _image(text: str, where: str, root: Path) -> ImageSource:
    """Returns a path joined with the root, or the image that the text itself is."""
    try:
        data = embedded_image(text)
    except SampleError as error:
        raise ConfigError(f"{where}: {error.problem} {error.remedy}") from None
    return str(root / text) if data is None else ImageBytes(where, data)
