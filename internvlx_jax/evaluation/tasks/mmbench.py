"""MMBench, dev and test splits in English and Chinese: multiple choice with circular evaluation.

Every question is asked with all rotations of its options and is right if every rotation is.
`internvl` reads a leading letter and asks in the language of the split; `vlmevalkit` infers the
option. The references of the test split are not public, so it writes a submission.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.evaluation.prompts import LETTER, LETTER_CN, choice, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    by_group,
    first_options,
    inferred_options,
    mean,
    server,
)
from internvlx_jax.evaluation.sources import Roots, Source, tsv, tsv_path
from internvlx_jax.evaluation.submissions import numeric_index
from internvlx_jax.evaluation.tables import write_table
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

CIRCLE = 1_000_000  # rotations of a question have the same index modulo this

SUBMISSION_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
SUBMISSION_POSITION = 6  # column of the prediction


def all_rotations_right(indices: Sequence[int], right: Sequence[bool]) -> dict[int, bool]:
    """Maps the first index of each question to whether all of its rotations are right."""
    groups: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    for index, hit in zip(indices, right, strict=True):
        groups[index % CIRCLE].append((index, hit))
    return {min(group)[0]: all(hit for _, hit in group) for group in groups.values()}


def circular(rows: Sequence[Answered], context: Context) -> Result:
    """Scores questions as InternVL does: the leading letter counts."""
    return _circular(rows, first_options(rows))


def circular_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores questions as VLMEvalKit does: the option is inferred."""
    letters, notes = inferred_options(rows, context)
    return _circular(rows, letters, notes)


def _circular(
    rows: Sequence[Answered], letters: Sequence[str], notes: Sequence[str] = ()
) -> Result:
    right = [
        not row.error and letter in row.question.answers
        for letter, row in zip(letters, rows, strict=True)
    ]
    indices = [int(row.question.id) for row in rows]
    questions = all_rotations_right(indices, right)
    fields = {int(row.question.id): row.question.fields for row in rows}
    whole = list(questions.values())
    parts = {"questions": len(questions), "one_rotation": 100 * mean(right)} | {
        column: by_group([fields[index].get(column, "") for index in questions], whole)
        for column in ("l2-category", "category")
    }
    return Result(100 * mean(whole), [float(hit) for hit in right], letters, parts, notes)


def server_choice(rows: Sequence[Answered], context: Context) -> Result:
    """Reads the letters for the submission; a server scores them."""
    return dataclasses.replace(server(rows, context), predictions=first_options(rows))


def write_submission(
    folder: Path, questions: Sequence[Question], predictions: Sequence[str]
) -> Path:
    """Writes submission.xlsx: columns of the TSV file, and the prediction between them."""
    rows = []
    for question, prediction in zip(questions, predictions, strict=True):
        columns = numeric_index(question.fields)
        cells = [item for item in columns.items() if item[0] not in SUBMISSION_DROPPED]
        cells.insert(SUBMISSION_POSITION, ("prediction", prediction))
        rows.append(dict(cells))
    return write_table(folder / "submission", rows)


def _folder(file: str) -> Source:
    """Returns the source of a TSV file in data/mmbench."""

    def inside(roots: Roots) -> Roots:
        return dataclasses.replace(roots, tsv=roots.data / "mmbench")

    source = tsv(file)
    return Source(
        lambda roots: [tsv_path(inside(roots), file)], lambda roots: source.read(inside(roots))
    )


def _task(split: str, language: str, file: str) -> Task:
    test = split == "test"
    dataset = f"MMBench_{split.upper()}_{language.upper()}"
    submission = write_submission if test else None
    return Task(
        name=f"mmbench_{split}_{language}",
        title=f"MMBench, {split}, {language}",
        samples=None,
        same_question=lambda id: int(id) % CIRCLE,
        protocols={
            "internvl": internvl(
                _folder(file),
                choice(LETTER if language == "en" else LETTER_CN),
                server_choice if test else circular,
                max_new_tokens=100,
                dataset=dataset,
                submission=submission,
            ),
            "vlmevalkit": vlmevalkit(
                tsv(dataset),
                vlm_choice,
                server if test else circular_vlm,
                dataset=dataset,
                submission=submission,
            ),
        },
    )


TASKS = (
    _task("dev", "en", "mmbench_dev_20230712"),
    _task("dev", "cn", "mmbench_dev_cn_20231003"),
    _task("test", "en", "mmbench_test_en_20231003"),
    _task("test", "cn", "mmbench_test_cn_20231003"),
)
