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
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(questions) >= limit:
            break
        if line.strip():
            questions.append(_question(line, f"{path} line {number}", root, len(questions)))
    if not questions:
        raise ConfigError(f"{path}: no questions in it")
    if len({question.id for question in questions}) != len(questions):
        raise ConfigError(f"{path}: question_id is not unique")
    return questions


def _question(line: str, where: str, root: Path, index: int) -> Question:
    try:
        fields: dict[str, Any] = json.loads(line)
        text, answer = fields["question"], fields["answer"]
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not valid JSON ({error})") from error
    except (KeyError, TypeError):
        raise ConfigError(f'{where}: needs the fields "question" and "answer"') from None
    answers = answer if isinstance(answer, list) else [answer]
    image = fields.get("image") or []
    images = image if isinstance(image, list) else [image]
    if not isinstance(text, str) or not answers or not all(isinstance(item, str) for item in [*answers, *images]):
        raise ConfigError(f'{where}: "question", "answer" and "image" must be texts or lists of texts')
    return Question(where, fields.get("question_id", index), tuple(str(root / item) for item in images), text,
                    tuple(answers))
