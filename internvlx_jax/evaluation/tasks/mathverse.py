"""MathVerse: one set of mathematical problems with more or less of the problem inside the image.

VLMEvalKit's prompt and metric, on the five versions with images and on single ones: a judge first
extracts the answer, and then compares it with the reference unless the texts are equal.
"""

import dataclasses
import json
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.cot import boxed_answer
from internvlx_jax.evaluation.judge import ask_until, fill
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, by_group, mean
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TEMPERATURES = (0.0, 0.5, 1.0, 1.5, 2.0)
JUDGE_TOKENS = 128
COLUMNS = ("answer", "question_for_eval", "metadata")
GROUPS = ("problem_version", "subject", "subfield")


def prompt(question: Question) -> str:
    """Returns the question; the instruction to answer at once is softened for InternVL."""
    return question.text.replace("please directly answer the question and", "please")


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the judge's verdict on what the judge extracted, in total and per kind of problem."""
    asked = [i for i, row in enumerate(rows) if not row.error]
    extracted: list[str | None] = [None] * len(rows)
    requests = [fill("mathverse_extract", prediction=rows[i].text) for i in asked]
    for i, reply in zip(
        asked, ask_until(context.judge, requests, str, max_tokens=JUDGE_TOKENS), strict=True
    ):
        extracted[i] = reply
    equal = {
        i: text.strip() == rows[i].question.answers[0].strip()
        for i, text in enumerate(extracted)
        if text is not None
    }
    unequal = [i for i, same in equal.items() if not same]
    verdicts = ask_until(
        context.judge,
        [_comparison(rows[i].question, extracted[i] or "") for i in unequal],
        _verdict,
        temperatures=TEMPERATURES,
        max_tokens=JUDGE_TOKENS,
    )
    judged = dict(zip(unequal, verdicts, strict=True))
    waiting = any(text is None and not row.error for text, row in zip(extracted, rows, strict=True))
    scores = [
        0.0 if row.error else None if i not in equal else float(equal[i] or bool(judged[i]))
        for i, row in enumerate(rows)
    ]
    texts = [row.text if text is None else text for row, text in zip(rows, extracted, strict=True)]
    if waiting:
        return Result(None, [None] * len(rows), texts, pending=True)
    known = [value or 0.0 for value in scores]
    parts = {
        group: by_group([row.question.fields["metadata_fields"][group] for row in rows], known)
        for group in GROUPS
    }
    return Result(100 * mean(known), scores, texts, parts)


def _comparison(question: Question, extracted: str) -> str:
    return fill(
        "mathverse_score",
        question=question.fields["question_for_eval"],
        answer=question.answers[0],
        extract=extracted,
    )


def _verdict(reply: str) -> bool | None:
    """Reads a verdict; None where the judge has to be asked again."""
    return {"1": True, "0": False}.get(reply.strip())


def _described(question: Question) -> Question:
    """Reads the columns that the metric needs."""
    row, where = question.fields, question.where
    if not question.answers:
        raise ConfigError(f"{where}: no answer to compare with; download the file again")
    try:
        described = json.loads(row["metadata"].replace("'", '"'))
        fields = {group: str(described.get(group, "")) for group in GROUPS}
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{where}: metadata is no dictionary ({error}); correct the row"
        ) from None
    fields["problem_version"] = fields["problem_version"] or str(row.get("problem_version", ""))
    return dataclasses.replace(question, fields=dict(row) | {"metadata_fields": fields})


def _task(version: str, samples: int) -> Task:
    dataset = "_".join(filter(None, ("MathVerse_MINI", version)))
    spec = vlmevalkit(
        tsv(dataset, needs=COLUMNS, finish=_described),
        prompt,
        score,
        dataset=dataset,
        cot=boxed_answer(prompt),
    )
    return Task(
        name="_".join(filter(None, ("mathverse", version.lower()))),
        title=f"MathVerse, testmini, {version.replace('_', ' ').lower() or 'all versions'}",
        samples=samples,
        protocols={"vlmevalkit": spec},
    )


TASKS = (
    _task("", 3940),
    *(
        _task(version, 788)
        for version in (
            "Vision_Only",
            "Vision_Dominant",
            "Vision_Intensive",
            "Text_Lite",
            "Text_Dominant",
        )
    ),
)
