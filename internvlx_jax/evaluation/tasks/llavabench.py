"""LLaVA-Bench (in the wild): open questions, graded by a judge beside a reference answer.

The score is the model's mean grade relative to the reference's. `vlmevalkit` reads a TSV file;
`internvl` reads the original files. Both count unreadable judgments as -1.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.json_text import read_jsonl
from internvlx_jax.evaluation.judge import PROMPTS, ask_until, fill
from internvlx_jax.evaluation.prompts import ending
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
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
    required,
    tsv,
)
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

GRADES = tuple[float, float]  # of the reference and of the model, 1 to 10
TEMPERATURES = (0.2,) * 3  # of the tries until a judgment can be read

FOLDER = "llava-bench-in-the-wild"
QUESTIONS = jsonl(f"{FOLDER}/questions.jsonl", text="text")
CONTEXT, REFERENCE = f"{FOLDER}/context.jsonl", f"{FOLDER}/answers_gpt4.jsonl"


def _read(roots: Roots) -> list[Question]:
    captions = {
        required(row, "image", where): required(row, "caption", where)
        for where, row in read_jsonl(roots.data / CONTEXT)
    }
    captions = {
        name: "\n".join(caption) if isinstance(caption, list) else caption
        for name, caption in captions.items()
    }
    references = {
        required(row, "question_id", where): required(row, "text", where)
        for where, row in read_jsonl(roots.data / REFERENCE)
    }

    def finish(question: Question) -> Question:
        name = image_name(question.images[0])
        required(question.fields, "category", question.where)
        if name not in captions:
            raise ConfigError(f"{question.where}: image {name} is not in {roots.data / CONTEXT}")
        if question.id not in references:
            raise ConfigError(
                f"{question.where}: question_id {question.id} is not in {roots.data / REFERENCE}"
            )
        return dataclasses.replace(
            question,
            images=(image_path(f"{FOLDER}/images/{name}", roots),),
            answers=(references[question.id],),
            fields=dict(question.fields) | {"caption": captions[name]},
        )

    return [finish(question) for question in QUESTIONS.read(roots)]


def _tsv_reference(question: Question) -> Question:
    return dataclasses.replace(question, answers=(question.fields["gpt4_ans"],))


SOURCE = Source(
    lambda roots: [*QUESTIONS.files(roots), roots.data / CONTEXT, roots.data / REFERENCE], _read
)


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores 100 * mean(model) / mean(reference) of the judge's grades, also per category."""
    as_published = "llavabench_minus1" in context.compat
    prompts = [
        fill(
            "llavabench",
            caption=row.question.fields["caption"],
            question=row.question.text,
            reference=row.question.answers[0],
            prediction=row.text,
        )
        for row in rows
    ]
    judge = TrackingJudge(context.judge)
    system = PROMPTS["llavabench_system"]
    grades = ask_until(
        judge,
        prompts,
        read_published if as_published else read_grades,
        temperatures=TEMPERATURES[: 1 if as_published else None],
        system=system,
    )
    if judge.missing:
        return pending(rows)
    parts = _relative_scores(rows, grades)
    unread = grades.count(None)
    notes = [f"{unread} judgments could not be read; these questions are left out"] * bool(unread)
    return Result(
        parts["all"]["relative"] if parts else None,
        [grade and grade[1] for grade in grades],
        [row.text for row in rows],
        parts,
        notes,
    )


def read_grades(reply: str) -> GRADES | None:
    """Reads the two numbers of the first line, however they are separated; None unless two."""
    try:
        reference, model = map(float, reply.split("\n")[0].replace(",", " ").split())
    except ValueError:
        return None
    return reference, model


def read_published(reply: str) -> GRADES:
    """Reads two numbers with one blank or comma between them, and else -1 for both."""
    try:
        reference, model = map(float, reply.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return -1.0, -1.0
    return reference, model


def _relative_scores(
    rows: Sequence[Answered], grades: Sequence[GRADES | None]
) -> dict[str, dict[str, float]]:
    """Returns the scores of all rows and of each category, sorted by name."""
    groups: dict[str, list[GRADES]] = defaultdict(list)
    for row, grade in zip(rows, grades, strict=True):
        if grade is not None:
            groups["all"].append(grade)
            groups[row.question.fields["category"]].append(grade)
    parts = {}
    for name in sorted(groups):
        reference, model = (mean(column) for column in zip(*groups[name], strict=True))
        parts[name] = {
            "relative": 100 * model / reference if reference else 0.0,
            "reference": 10 * reference,
            "model": 10 * model,
        }
    return parts


TASKS = (
    Task(
        name="llavabench",
        title="LLaVA-Bench, relative score",
        samples=60,
        protocols={
            "vlmevalkit": vlmevalkit(
                tsv(
                    "LLaVABench",
                    needs=("gpt4_ans", "caption", "category"),
                    finish=_tsv_reference,
                ),
                ending("\nAnswer this question in detail."),
                score,
                dataset="LLaVABench",
                compat=("llavabench_minus1",),
            ),
            "internvl": internvl(
                SOURCE,
                ending(" Please give a detailed answer."),
                score,
                max_new_tokens=1000,
                dataset="LLaVABench",
                compat=("llavabench_minus1",),
                table=lambda question: {"gpt4_ans": question.answers[0]},
            ),
        },
    ),
)
