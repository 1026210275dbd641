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
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    inferred_yes_or_no,
    yes_no_hits,
)
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
_CJK_TO_9FA5 = re.compile(r"[\u4e00-\u9fa5]+")  # the range of InternVL's script


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
                name, text, answer = line.strip().split("\t")
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


def label(text: str, *, cjk: re.Pattern[str] = _CJK) -> str:
    """Returns "yes", "no" or "other" from the first four characters of the cleaned answer."""
    for chinese, english in (("\n", ""), ("不是", "No"), ("是", "Yes"), ("否", "No")):
        text = text.replace(chinese, english)
    start = cjk.sub("", text.lower().replace("true", "yes").replace("false", "no"))[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def task_scores(
    kinds: Sequence[str],
    right: Sequence[bool | None],
    images: Sequence[str] | None = None,
) -> dict[str, float]:
    """Scores each task: 100 * accuracy + 100 * share of images with both questions right.

    Args:
        kinds: task of each row.
        right: whether each row is right; None leaves it out of the accuracy.
        images: image of each row. Without them two neighbors of a task are one image, in the order
            of its file. A row without its partner, which --limit may leave, counts in the accuracy
            alone.

    Returns:
        Scores by task, and their sums `perception` and `cognition`.
    """
    rows: dict[str, list[bool | None]] = defaultdict(list)
    pairs: dict[str, dict[str | int, list[bool | None]]] = defaultdict(lambda: defaultdict(list))
    for i, (kind, hit) in enumerate(zip(kinds, right, strict=True)):
        pairs[kind][images[i] if images else len(rows[kind]) // 2].append(hit)
        rows[kind].append(hit)
    scores = {}
    for kind, hits in rows.items():
        counted = [hit for hit in hits if hit is not None]
        both = [bool(pair[0] and pair[1]) for pair in pairs[kind].values() if len(pair) > 1]
        scores[kind] = 100 * (sum(counted) / len(counted) if counted else 0.0)
        scores[kind] += 100 * (sum(both) / len(both) if both else 0.0)
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if any(kind in scores for kind in group):
            scores[name] = sum(scores.get(kind, 0.0) for kind in group)
    return scores


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores answers as InternVL's script reads them, whose lines have tabs between the fields."""
    cjk = _CJK_TO_9FA5 if "mme_cjk" in context.compat else _CJK
    labels = [label(row.text, cjk=cjk) for row in rows]
    right = [
        not row.error and found == row.question.answers[0].lower()
        for found, row in zip(labels, rows, strict=True)
    ]
    cut = [i for i, row in enumerate(rows) if "\t" in row.text]
    if not cut or "mme_tab" not in context.compat:
        return _result(rows, labels, right)
    notes = [f"{len(cut)} answers with a tab are left out of the accuracy"]
    return _result(rows, labels, right, notes, left_out=frozenset(cut))


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores answers as VLMEvalKit infers them, and pairs rows by `image_path`."""
    labels, notes = inferred_yes_or_no(rows, context)
    images = [row.question.fields["image_path"] for row in rows]
    return _result(rows, labels, yes_no_hits(rows, labels, context), notes, images)


def _result(
    rows: Sequence[Answered],
    labels: Sequence[str],
    right: Sequence[bool],
    notes: Sequence[str] = (),
    images: Sequence[str] | None = None,
    left_out: frozenset[int] = frozenset(),
) -> Result:
    counted = [None if i in left_out else hit for i, hit in enumerate(right)]
    parts = task_scores([row.question.fields["category"] for row in rows], counted, images)
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
                compat=("mme_tab", "mme_cjk"),
            ),
            "vlmevalkit": vlmevalkit(
                tsv("MME", needs=("answer", "category", "image_path")),
                PROMPT,
                score_vlm,
                dataset="MME",
            ),
        },
    ),
)
