"""RefCOCO, RefCOCO+ and RefCOCOg: the box that a phrase describes, right from an IoU of 0.5 on.

`internvl` has a task per split and the metric of the InternVL script. `vlmevalkit` has one task
for the TSV file with all splits; its score is the mean over the splits.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_jsonl
from internvlx_jax.evaluation.metrics import boxes
from internvlx_jax.evaluation.prompts import plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, by_group, hits, mean
from internvlx_jax.evaluation.sources import Roots, Source, image_path, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

# Name of each task, its file, title and number of phrases.
SPLITS = (
    ("refcoco_val", "refcoco_val", "RefCOCO, val", 10834),
    ("refcoco_testA", "refcoco_testA", "RefCOCO, test A", 5657),
    ("refcoco_testB", "refcoco_testB", "RefCOCO, test B", 5095),
    ("refcoco+_val", "refcoco+_val", "RefCOCO+, val", 10758),
    ("refcoco+_testA", "refcoco+_testA", "RefCOCO+, test A", 5726),
    ("refcoco+_testB", "refcoco+_testB", "RefCOCO+, test B", 4889),
    ("refcocog_val", "refcocog_val", "RefCOCOg, val", 4896),
    ("refcocog_test", "refcocog_test", "RefCOCOg, test", 9602),
)
TSV_SPLITS = (
    "RefCOCO_val",
    "RefCOCO_testA",
    "RefCOCO_testB",
    "RefCOCO+_val",
    "RefCOCO+_testA",
    "RefCOCO+_testB",
    "RefCOCOg_val",
    "RefCOCOg_test",
)
_ENDINGS = {"val": "val", "test": "test", "testa": "testA", "testb": "testB"}
_CORNERS = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")


def prompt(question: Question) -> str:
    """Returns the request for the box of a phrase."""
    return (
        "Please provide the bounding box coordinate of the region this sentence describes: "
        f"<ref>{question.text}</ref>"
    )


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the share of boxes that overlap enough, as the InternVL script does."""
    right, read = [], []
    for row in rows:
        fields = row.question.fields
        box = boxes.internvl_box(row.text)
        overlap = boxes.internvl_overlap(box, fields["bbox"], fields["width"], fields["height"])
        right.append(overlap >= boxes.HIT)
        read.append(str(list(box)))
    return hits(rows, right, read)


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the mean over the splits of the share of boxes that overlap enough."""
    right, read = [], []
    for row in rows:
        fields = row.question.fields
        width, height = fields["pixels"]
        box = boxes.vlmevalkit_box(row.text)
        placed = None if box is None else boxes.in_pixels(box, width, height)
        target = fields["target"]
        overlap = 0.0 if placed is None else boxes.vlmevalkit_overlap(placed, target)
        right.append(overlap >= boxes.HIT)
        read.append("" if placed is None else str([round(value, 6) for value in placed]))
    result = hits(rows, right, read)
    known = [value or 0.0 for value in result.scores]
    parts = by_group([row.question.fields["split"] for row in rows], known)
    averaged = [parts[name] for name in TSV_SPLITS if name in parts]
    headline = mean(averaged) if averaged else 100 * mean(known)
    return dataclasses.replace(result, score=headline, parts=parts)


def _phrases(file: str) -> Source:
    path = f"refcoco/{file}.jsonl"

    def read(roots: Roots) -> list[Question]:
        questions = []
        for where, row in read_jsonl(roots.data / path):
            try:
                box = tuple(map(float, row["bbox"]))
                fields = {"bbox": list(box), "width": row["width"], "height": row["height"]}
                image = image_path(row["image"], roots, (roots.data / path).parent)
                text = row["sent"]
            except (KeyError, TypeError, ValueError):
                box, image, text, fields = (), "", "", {}
            if len(box) != 4 or not isinstance(text, str):
                raise ConfigError(
                    f'{where}: needs "image", "sent", "bbox" (four numbers), "width" and "height"'
                )
            answer = boxes.in_thousandths(box, fields["width"], fields["height"])
            id = len(questions)
            questions.append(Question(where, id, (image,), text, (answer,), fields=fields))
        return questions

    return Source(lambda roots: [roots.data / path], read)


def tsv_split(category: str) -> str:
    """Maps a category such as "RefCOCO test A" to the name of its split, "RefCOCO_testA"."""
    label, _, rest = category.strip().partition(" ")
    if not rest.strip():
        return label
    joined = "".join(letter for letter in rest.strip().lower() if letter not in " \t_-")
    return f"{label}_{_ENDINGS.get(joined, rest.strip().replace(' ', '_').replace('-', '_'))}"


def _placed(question: Question) -> Question:
    """Reads size, split and reference box of a row.

    The box stands in four columns of px, or in the answer in fractions, thousandths or px.
    """
    row, where = question.fields, question.where
    try:
        sides = [float(row.get(side) or 1) for side in ("width", "height")]
        width, height = (side if side > 0 else 1.0 for side in sides)
        corners = tuple(float(row[name]) for name in _CORNERS) if _CORNERS[0] in row else None
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{where}: size or box is no number ({error}); correct it") from None
    if corners is None:
        written = boxes.vlmevalkit_box(row.get("answer", ""))
        corners = None if written is None else _reference(written, width, height)
    if corners is None:
        raise ConfigError(
            f"{where}: no box; it stands in the answer as [x1, y1, x2, y2] or in the columns "
            f"{', '.join(_CORNERS)}"
        )
    split = row.get("split") or tsv_split(row.get("category", "")) or "RefCOCO"
    return dataclasses.replace(
        question,
        answers=(boxes.in_thousandths(corners, width, height),),
        fields=dict(row) | {"split": split, "target": corners, "pixels": (width, height)},
    )


def _reference(box: boxes.Box, width: float, height: float) -> boxes.Box:
    """Returns the box of an answer in px: fractions are scaled, other numbers are px already."""
    if max(map(abs, box)) > 1.5:
        return box
    return box[0] * width, box[1] * height, box[2] * width, box[3] * height


def _read_all(roots: Roots) -> list[Question]:
    """Reads the TSV file, whose indices are unique within a split only."""
    return [
        dataclasses.replace(
            question,
            id=f"{question.fields['split']}_{question.fields['index']}",
            fields=dict(question.fields)
            | {"index": f"{question.fields['split']}_{question.fields['index']}"},
        )
        for question in _ALL.read(roots)
    ]


def _files(roots: Roots) -> list[Path]:
    return _ALL.files(roots)


_ALL = tsv("RefCOCO", finish=_placed)

TASKS = (
    *(
        Task(
            name=name,
            title=title,
            samples=samples,
            protocols={"internvl": internvl(_phrases(file), prompt, score, max_new_tokens=100)},
        )
        for name, file, title, samples in SPLITS
    ),
    Task(
        name="refcoco_all",
        title="RefCOCO, RefCOCO+ and RefCOCOg",
        samples=None,
        protocols={
            "vlmevalkit": vlmevalkit(Source(_files, _read_all), plain, score_vlm, dataset="RefCOCO")
        },
    ),
)
