"""MM-Vet: open questions, graded 0 to 1 by a judge, also per capability.

`internvl` reads the original files and puts a space behind the question; `vlmevalkit` reads a TSV
file. Both write a submission for the benchmark's server.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.evaluation.judge import ask_until, fill
from internvlx_jax.evaluation.prompts import ending, plain
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    RISING,
    Answered,
    Context,
    Result,
    TrackingJudge,
    mean,
    pending,
)
from internvlx_jax.evaluation.sources import (
    Roots,
    Source,
    image_name,
    image_path,
    jsonl,
    read_json,
    required,
    tsv,
)
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("mm-vet/llava-mm-vet.jsonl", text="text")
KEY = "mm-vet/mm-vet.json"


def _read(roots: Roots) -> list[Question]:
    key = read_json(roots.data / KEY)

    def finish(question: Question) -> Question:
        try:
            entry = key[f"v1_{str(question.id).removeprefix('v1_')}"]
        except KeyError:
            raise ConfigError(
                f"{question.where}: question_id {question.id} is not in {roots.data / KEY}"
            ) from None
        # The file names images without their folder.
        images = tuple(
            image_path(f"mm-vet/images/{image_name(path)}", roots) for path in question.images
        )
        return dataclasses.replace(
            question,
            images=images,
            answers=(required(entry, "answer", roots.data / KEY),),
            fields=dict(question.fields)
            | {"category": ",".join(required(entry, "capability", roots.data / KEY))},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


SOURCE = Source(lambda roots: [*QUESTIONS.files(roots), roots.data / KEY], _read)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores 100 * mean of the judge's grades; a grade that five tries do not give is 0."""
    asked = [i for i, row in enumerate(rows) if not row.error]
    prompts = [_judge_prompt(rows[i]) for i in asked]
    judge = TrackingJudge(context.judge)
    replies = ask_until(judge, prompts, _grade, temperatures=RISING)
    if judge.missing:
        return pending(rows)
    grades = dict(zip(asked, replies, strict=True))
    scores = [grades.get(i) or 0.0 for i in range(len(rows))]
    capabilities: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, scores, strict=True):
        for capability in row.question.fields["category"].split(","):
            capabilities[capability.strip()].append(value)
    ungraded = replies.count(None)
    notes = [f"the judge gave no number for {ungraded} answers; they count 0"] * bool(ungraded)
    return Result(
        100 * mean(scores),
        scores,
        [row.text for row in rows],
        {name: 100 * mean(capabilities[name]) for name in sorted(capabilities)},
        notes,
    )


def _judge_prompt(row: Answered) -> str:
    answer = row.question.answers[0].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return fill("mmvet", question=row.question.text, prediction=row.text, answer=answer)


def _grade(reply: str) -> float | None:
    """Returns the number of a reply, None if it is none from 0 to 1."""
    try:
        value = float(reply.strip())
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def write_submission(
    folder: Path, questions: Sequence[Question], predictions: Sequence[str]
) -> Path:
    """Writes submission.json: {"v1_<id>": text}."""
    path = folder / "submission.json"
    write_json(
        path,
        {
            f"v1_{str(question.id).removeprefix('v1_')}": prediction
            for question, prediction in zip(questions, predictions, strict=True)
        },
    )
    return path


TASKS = (
    Task(
        name="mmvet",
        title="MM-Vet",
        samples=218,
        protocols={
            "internvl": internvl(
                SOURCE,
                ending(" "),
                score,
                max_new_tokens=1000,
                dataset="MMVet",
                submission=write_submission,
            ),
            "vlmevalkit": vlmevalkit(
                tsv("MMVet", needs=("answer", "category")),
                plain,
                score,
                dataset="MMVet",
                submission=write_submission,
            ),
        },
    ),
)
