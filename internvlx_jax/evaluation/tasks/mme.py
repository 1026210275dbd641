"""MME: two yes-or-no questions per image, in ten tasks of perception and four of cognition.

The score adds accuracy and the share of images with both questions right over all tasks. `internvl`
reads the original text files and the first four characters of an answer; `vlmevalkit` reads a TSV
file and infers yes or no.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import text_lines
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, inferred_yes_or_no
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
KINDS = (*PERCEPTION, *COGNITION)
IMAGES = "mme/MME_Benchmark_release_version"

_CJK = re.compile(r"[\u4e00-\u9fff]+")


def _files(roots: Roots) -> list[Path]:
    """Lists TASK.txt of each task; InternVL keeps them beside its scripts, so that is tried too."""
    folders = (
        roots.data / "mme" / "Your_Results",
        roots.data.parent / "eval" / "mme" / "Your_Results",
        roots.data / IMAGES,
    )
    folder = next(
        (folder for folder in folders if (folder / f"{KINDS[0]}.txt").is_file()), folders[0]
    )
    return [folder / f"{kind}.txt" for kind in KINDS]


def _read(roots: Roots) -> list[Question]:
    questions = []
    for kind, file in zip(KINDS, _files(roots), strict=True):
        for number, line in text_lines(file):
            where = f"{file} line {number}"
            try:
                name, text, answer = line.split("\t")[:3]
            except ValueError:
                raise ConfigError(
                    f"{where}: expected image, question and answer with tabs between them"
                ) from None
            places = (
                roots.data / IMAGES / kind / name,
                roots.data / IMAGES / kind / "images" / name,
            )
            image = next((path for path in places if path.is_file()), places[0])
            questions.append(
                Question(
                    where,
                    f"{kind}/{name}/{number}",
                    (str(image),),
                    text,
                    (answer.strip(),),
                    fields={"category": kind, "image_path": f"{kind}/{name}"},
                )
            )
    return questions


def label(text: str) -> str:
    """Returns "yes", "no" or "other" from the first four characters of the cleaned answer."""
    for chinese, english in (("\n", ""), ("不是", "No"), ("是", "Yes"), ("否", "No")):
        text = text.replace(chinese, english)
    start = _CJK.sub("", text.lower().replace("true", "yes").replace("false", "no"))[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def task_scores(kinds: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
    """Scores each task: 100 * accuracy + 100 * share of images with both questions right.

    Args:
        kinds: task of each row. Rows of a task stand in the order of its file, where two
            neighbors are one image. A last row without its neighbor, which --limit may leave,
            counts in the accuracy alone.
        right: whether each row is right.

    Returns:
        Scores by task, and their sums `perception` and `cognition`.
    """
    rows: dict[str, list[bool]] = defaultdict(list)
    for kind, hit in zip(kinds, right, strict=True):
        rows[kind].append(hit)
    scores = {}
    for kind, hits in rows.items():
        pairs = [all(hits[i : i + 2]) for i in range(0, len(hits) - 1, 2)]
        both = sum(pairs) / len(pairs) if pairs else 0.0
        scores[kind] = 100 * sum(hits) / len(hits) + 100 * both
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if any(kind in scores for kind in group):
            scores[name] = sum(scores.get(kind, 0.0) for kind in group)
    return scores


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores answers as InternVL's script reads them."""
    return _score(rows, [label(row.text) for row in rows])


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores answers as VLMEvalKit infers them."""
    labels, notes = inferred_yes_or_no(rows, context)
    return _score(rows, [label.lower() for label in labels], notes)


def _score(rows: Sequence[Answered], labels: Sequence[str], notes: Sequence[str] = ()) -> Result:
    right = [
        not row.error and label == row.question.answers[0].lower()
        for label, row in zip(labels, rows, strict=True)
    ]
    parts = task_scores([row.question.fields["category"] for row in rows], right)
    total = parts.get("perception", 0.0) + parts.get("cognition", 0.0)
    return Result(total, [float(hit) for hit in right], labels, parts, notes)


PROMPT = ending(f" {BASE}")

TASKS = (
    Task(
        name="mme",
        title="MME, perception + cognition",
        samples=2374,
        protocols={
            "internvl": internvl(
                Source(_files, _read),
                PROMPT,
                score,
                max_new_tokens=20,
                min_new_tokens=0,
                dataset="MME",
            ),
            "vlmevalkit": vlmevalkit(tsv("MME"), PROMPT, score_vlm, dataset="MME"),
        },
    ),
)
