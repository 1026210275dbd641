"""Questions, and question files with one JSON object per line (design: evaluation.md 5)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.images import ImageSource
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

    Each line has `question`, `answer` (a text or a list of texts), and optionally `image` (a path
    or a list of paths) and `question_id`.

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
    for where, fields in itertools.islice(read_jsonl(path), limit):
        question = _question(fields, where, root, len(questions))
        if question.id in questions:
            raise ConfigError(
                f"{question.where}: question_id {question.id!r} is also in "
                f"{questions[question.id].where}; give each question its own"
            )
        questions[question.id] = question
    if not questions:
        raise ConfigError(f"{path}: no questions in it")
    return list(questions.values())


def read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE line N", JSON value) for each line that is not empty.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"question file {path} does not exist")
    with path.open("rb") as file:  # not splitlines: texts may hold other Unicode line separators
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path} line {number}"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise ConfigError(
                        f"{where}: not valid JSON ({error}); correct the line"
                    ) from error


def _question(fields: Any, where: str, root: Path, index: int) -> Question:
    try:
        text, answer = fields["question"], fields["answer"]
    except (KeyError, TypeError):
        raise ConfigError(f'{where}: needs the fields "question" and "answer"') from None
    answers = answer if isinstance(answer, list) else [answer]
    image = fields.get("image") or []
    images = image if isinstance(image, list) else [image]
    texts = [text, *answers, *images]
    if not answers or not all(isinstance(item, str) for item in texts):
        raise ConfigError(
            f'{where}: "question" must be a text, "answer" and "image" a text or a list of texts'
        )
    id = fields.get("question_id", index)
    if not isinstance(id, (str, int)):
        raise ConfigError(f'{where}: "question_id" must be a text or a whole number, got {id!r}')
    try:
        "".join([*texts, str(id)]).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: a text is not valid Unicode ({error}); correct the line"
        ) from error
    return Question(where, id, tuple(str(root / item) for item in images), text, tuple(answers))
