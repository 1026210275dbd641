"""InfographicVQA, validation and test splits: questions on infographics, scored by ANLS.

Both protocols ask alike but for white space; `internvl` reads the answers from the original
annotations. The references of the test split are not public, so it writes a submission.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.submissions import answers_by
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

VAL = jsonl(
    "infographicsvqa/val.jsonl",
    docvqa="infographicsvqa/infographicsVQA_val_v1.0_withQT.json",
)
SUBMISSION = answers_by("questionId")

TASKS = (
    Task(
        name="infovqa_val",
        title="InfographicVQA, validation",
        samples=2801,
        baseline_tiles=24,
        protocols={
            "internvl": internvl(
                VAL, ending(f" {BASE}"), scoring.anls, max_new_tokens=100, dataset="InfoVQA_VAL"
            ),
            "vlmevalkit": vlmevalkit(
                tsv("InfoVQA_VAL", needs=("answer",), finish=listed_answers),
                ending(f"\n{BASE}"),
                scoring.anls,
                dataset="InfoVQA_VAL",
            ),
        },
    ),
    Task(
        name="infovqa_test",
        title="InfographicVQA, test",
        samples=3288,
        baseline_tiles=24,
        protocols={
            "internvl": internvl(
                jsonl("infographicsvqa/test.jsonl"),
                ending(f" {BASE}"),
                scoring.server,
                max_new_tokens=100,
                submission=SUBMISSION,
            ),
            "vlmevalkit": vlmevalkit(
                tsv("InfoVQA_TEST"),
                ending(f"\n{BASE}"),
                scoring.server,
                dataset="InfoVQA_TEST",
                submission=SUBMISSION,
            ),
        },
    ),
)
