"""Question files: one JSON object a line (spec: evaluation.md 5)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from internvlx_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Question:
    """One line: `answers` are all accepted ones; `images` are resolved paths, none for a text question."""

    where: str
    id: str | int
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...]


def read_questions(path: Path, image_root: Path | None = None, limit: int | None = None) -> list[Question]:
    """Fields `question`, `answer` (text or list of texts), `image` (path, list of paths, or absent), `question_id`.

    Image paths are relative to `image_root`, by default the folder of the file. Raises FileNotFoundError, or
    ValueError naming file, line and field.
    """
    if not path.is_file():
        raise FileNotFoundError(f"question file {path} does not exist")
    root = path.parent if image_root is None else image_root
    questions: dict[str | int, Question] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if limit is not None and len(questions) >= limit:
                break
            if not line.strip():
                continue
            question = _question(line, f"{path} line {number}", root, len(questions))
            if question.id in questions:
                raise ConfigError(f"{question.where}: question_id {question.id!r} is also in "
                                  f"{questions[question.id].where}; give each question its own")
            questions[question.id] = question
    if not questions:
        raise ConfigError(f"{path}: no questions in it")
    return list(questions.values())


def _question(line: bytes, where: str, root: Path, index: int) -> Question:
    try:
        fields: dict[str, Any] = json.loads(line)
        text, answer = fields["question"], fields["answer"]
    except (KeyError, TypeError):
        raise ConfigError(f'{where}: needs the fields "question" and "answer"') from None
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({error}); correct the line") from error
    answers = answer if isinstance(answer, list) else [answer]
    image = fields.get("image") or []
    images = image if isinstance(image, list) else [image]
    texts = [text, *answers, *images]
    if not answers or not all(isinstance(item, str) for item in texts):
        raise ConfigError(f'{where}: "question" must be a text, "answer" and "image" a text or a list of texts')
    id = fields.get("question_id", index)
    if not isinstance(id, (str, int)):
        raise ConfigError(f'{where}: "question_id" must be a text or a whole number, got {id!r}')
    try:
        "".join([*texts, str(id)]).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: a text is not valid Unicode ({error}); correct the line") from error
    return Question(where, id, tuple(str(root / item) for item in images), text, tuple(answers))
