"""Reads questions: from InternVL's data folder, from TSV files, from question files of users.

(design: evaluation.md 5)
"""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import invalid_text, read_jsonl, shown
from internvlx_jax.data.conversations import lost_picture
from internvlx_jax.data.images import ImageBytes, ImageSource, embedded_image
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.tsv import list_cell, read_tsv
from internvlx_jax.evaluation.video_frames import question_frames
from internvlx_jax.inference.videos import FRAMES

Answers = Mapping[str, Sequence[str]]
Finish = Callable[[Question], Question]
# Fields of a line of a question file.
_FIELDS = frozenset({"question", "answer", "image", "images", "video", "question_id"})


@dataclasses.dataclass(frozen=True)
class Roots:
    """The folders of the data.

    Attributes:
        data: InternVL's data folder.
        tsv: folder of the TSV files.
        frames: number of frames of a video; None takes the benchmark's own.
        compat: deviations in force; `pandas_cells` is about cells of TSV files.
    """

    data: Path
    tsv: Path
    frames: int | None = None
    compat: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Source:
    """The questions of a benchmark.

    Attributes:
        files: lists the files that are needed and identify the data; images are not among them.
        read: reads the questions in their canonical order; raises ConfigError naming file and line.
    """

    files: Callable[[Roots], list[Path]]
    read: Callable[[Roots], list[Question]]

    def missing(self, roots: Roots) -> list[Path]:
        """Lists the files that do not exist."""
        return [path for path in self.files(roots) if not path.exists()]


def jsonl(
    path: str,
    *,
    text: str = "question",
    coco: str | None = None,
    docvqa: str | None = None,
    finish: Finish = lambda question: question,
) -> Source:
    """Returns a source with one JSON object per line.

    Args:
        path: the file below the data root. A line has `image`, the question, `question_id`,
            `answer`, and fields of the task.
        text: name of the field of the question.
        coco, docvqa: a file below the data root with the answers by question id, in the layout of
            COCO VQA or of DocVQA; without either the line has the answers.
        finish: completes each question.
    """
    annotations = coco or docvqa
    read_answers = _coco_answers if coco else _docvqa_answers

    def files(roots: Roots) -> list[Path]:
        return [roots.data / name for name in (path, annotations) if name]

    def read(roots: Roots) -> list[Question]:
        file, *answers = files(roots)
        keys = read_answers(*answers) if answers else None
        questions = []
        for where, row in read_jsonl(file):
            try:
                question = _question(where, row, text, len(questions), file, roots)
            except (KeyError, TypeError):
                raise ConfigError(f'{where}: needs the fields "image" and "{text}"') from None
            if keys is not None:
                if str(question.id) not in keys:
                    raise ConfigError(f"{where}: question_id {question.id} is not in {answers[0]}")
                question = dataclasses.replace(question, answers=tuple(keys[str(question.id)]))
            questions.append(finish(question))
        return questions

    return Source(files, read)


def tsv(
    name: str,
    *,
    needs: Sequence[str] = (),
    question: str | None = None,
    keep: Callable[[Mapping[str, str]], bool] = lambda row: True,
    finish: Finish = lambda question: question,
) -> Source:
    """Returns a source with the rows of NAME.tsv.

    Args:
        name: name of the file in the TSV root, without its ending.
        needs: columns that prompts and metrics read, besides index, image and question.
        question: text in place of the column of the questions.
        keep: chooses rows by their columns.
        finish: completes each question.
    """

    def read(roots: Roots) -> list[Question]:
        return [
            finish(row)
            for row in read_tsv(
                tsv_path(roots, name),
                needs,
                pandas="pandas_cells" in roots.compat,
                question=question,
            )
            if keep(row.fields)
        ]

    return Source(lambda roots: [tsv_path(roots, name)], read)


def tsv_path(roots: Roots, name: str) -> Path:
    """Returns the path of NAME.tsv."""
    return roots.tsv / f"{name}.tsv"


def listed_answers(question: Question) -> Question:
    """Splits the answers, which TSV files of VQA datasets may hold as a Python list."""
    answers = listed_cell(question.answers[0], question.where) if question.answers else ()
    return dataclasses.replace(question, answers=answers)


def listed(column: str) -> Finish:
    """Returns what `listed_answers` does, for answers in another column."""

    def finish(question: Question) -> Question:
        return dataclasses.replace(
            question, answers=listed_cell(question.fields[column], question.where)
        )

    return finish


def listed_cell(cell: str, where: str) -> tuple[str, ...]:
    """Returns the items of a Python list, or a text such as "[unclear]" as it is.

    Raises:
        ConfigError: a list of quoted texts is damaged; the message begins with `where`.
    """
    if not re.match(r"\s*\[\s*['\"]", cell):
        try:
            items = ast.literal_eval(cell)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            items = None
        return tuple(map(str, items)) if isinstance(items, list) else (cell,)
    return list_cell(cell.strip(), where)


def _coco_answers(path: Path) -> Answers:
    """Reads answers in the COCO VQA layout: annotations[].question_id, answers[].answer."""
    return {
        str(required(row, "question_id", path)): [
            required(answer, "answer", path) for answer in required(row, "answers", path)
        ]
        for row in read_json(path, "annotations")
    }


def _docvqa_answers(path: Path) -> Answers:
    """Reads answers in the DocVQA layout: data[].questionId, answers."""
    return {
        str(required(row, "questionId", path)): required(row, "answers", path)
        for row in read_json(path, "data")
    }


def required(row: Any, name: str, where: str | Path) -> Any:
    """Returns a field of a record.

    Args:
        row: the record.
        name: name of the field.
        where: the file, and the line if there are lines, for the message.

    Raises:
        ConfigError: it has no such field.
    """
    try:
        return row[name]
    except (KeyError, TypeError):
        raise ConfigError(
            f'{where}: no field "{name}", which this benchmark needs; download the file again'
        ) from None


def read_json(path: Path, field: str | None = None) -> Any:
    """Reads a JSON file, or one field of it.

    Raises:
        ConfigError: it is not JSON or lacks the field; the message names the file.
    """
    try:
        value = json.loads(path.read_bytes())
        return value if field is None else value[field]
    except (ValueError, LookupError, TypeError) as error:
        wanted = f'an object with "{field}"' if field else "JSON"
        raise ConfigError(
            f"{path}: not {wanted} ({type(error).__name__}: {error}); download it again"
        ) from None


def image_path(value: str, roots: Roots, *folders: Path) -> str:
    """Finds an image whose name is relative to one of several folders.

    These are the folder that contains the data root, the data root, and `folders`.
    """
    candidates = [folder / value for folder in (roots.data.parent, roots.data, *folders)]
    return str(next((path for path in candidates if path.is_file()), candidates[0]))


def image_name(image: ImageSource) -> str:
    """Returns the name of an image file without its folder."""
    return str(image).rpartition("/")[2]


def _question(
    where: str, row: Mapping[str, Any], text: str, index: int, file: Path, roots: Roots
) -> Question:
    image = row["image"]
    images = image if isinstance(image, list) else [image]
    answer = row.get("answer")
    answers = answer if isinstance(answer, list) else [] if answer is None else [answer]
    fields = {name: value for name, value in row.items() if name not in ("image", text, "answer")}
    paths = tuple(image_path(name, roots, file.parent) for name in images)
    return Question(
        where,
        row.get("question_id", index),
        paths,
        row[text],
        tuple(map(str, answers)),
        row.get("hint") or "",
        {},
        fields,
    )


# --- question files -------------------------------------------------------------------------------


def read_questions(
    path: Path,
    image_root: Path | None = None,
    limit: int | None = None,
    frames: int = FRAMES,
) -> list[Question]:
    """Reads a question file.

    Each line has `question`, `answer` (a text or a list of texts), and optionally `image` (a path,
    an image in base64 or as a data: URL, or a list of them; `images` is the same), `video` (a path
    of a file or of a folder of frames) and `question_id`. Other fields are a warning, once.

    Args:
        path: the file.
        image_root: folder of the image paths; the folder of the file by default.
        limit: read only the first lines.
        frames: number of frames of a video.

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
        question = _file_question(fields, where, root, len(questions), frames)
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


def _file_question(fields: Any, where: str, root: Path, index: int, frames: int) -> Question:
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
    sources = tuple(
        _file_image(item, f"{where} image {i}", root) for i, item in enumerate(images, 1)
    )
    video = fields.get("video") or None
    clip = () if video is None else question_frames(video, root, frames, where)
    return Question(where, id, sources, text, tuple(answers), frames=clip)


def _file_image(text: str, where: str, root: Path) -> ImageSource:
    """Returns a path joined with the root, or the image that the text itself is."""
    try:
        data = embedded_image(text)
    except SampleError as error:
        raise ConfigError(f"{where}: {error.problem} {error.remedy}") from None
    return str(root / text) if data is None else ImageBytes(where, data)
