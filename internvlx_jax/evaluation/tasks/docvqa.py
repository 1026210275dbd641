"""DocVQA, validation and test splits: questions on scanned documents, scored by ANLS.

Both protocols ask alike but for white space; `internvl` reads the answers from the original
annotations. The references of the test split are not public, so it writes a submission.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.submissions import answers_by
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

VAL = jsonl("docvqa/val.jsonl", docvqa="docvqa/val/val_v1.0.json")
SUBMISSION = answers_by("questionId")

TASKS = (
    Task(
        name="docvqa_val",
        title="DocVQA, validation",
        samples=5349,
        baseline_tiles=18,
        protocols={
            "internvl": internvl(
                VAL, ending(f" {BASE}"), scoring.anls, max_new_tokens=100, dataset="DocVQA_VAL"
            ),
            "vlmevalkit": vlmevalkit(
                tsv("DocVQA_VAL", needs=("answer",), finish=listed_answers),
                ending(f"\n{BASE}"),
                scoring.anls,
                dataset="DocVQA_VAL",
            ),
        },
    ),
    Task(
        name="docvqa_test",
        title="DocVQA, test",
        samples=5188,
        baseline_tiles=18,
        protocols={
            "internvl": internvl(
                jsonl("docvqa/test.jsonl"),
                ending(f" {BASE}"),
                scoring.server,
                max_new_tokens=100,
                submission=SUBMISSION,
            ),
            "vlmevalkit": vlmevalkit(
                tsv("DocVQA_TEST"),
                ending(f"\n{BASE}"),
                scoring.server,
                dataset="DocVQA_TEST",
                submission=SUBMISSION,
            ),
        },
    ),
)
