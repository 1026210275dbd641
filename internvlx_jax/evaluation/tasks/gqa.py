"""GQA, balanced test-dev split: compositional questions on photos, scored by exact match.

Trailing full stops of a prediction are ignored; the protocols differ in white space of the prompt.
"""

from collections.abc import Sequence

from internvlx_jax.evaluation.metrics import exact
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.scoring import mean_of
from internvlx_jax.evaluation.sources import jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def exact_without_stops(prediction: str, answers: Sequence[str]) -> float:
    """Returns `exact` of the prediction without trailing full stops."""
    return exact(prediction.strip().rstrip("."), answers)


EXACT = mean_of(exact_without_stops)

TASKS = (
    Task(
        name="gqa_testdev",
        title="GQA, test-dev balanced",
        samples=12578,
        protocols={
            "internvl": internvl(
                jsonl("gqa/llava_gqa_testdev_balanced_qwen_format.jsonl"),
                ending(f" {BASE}"),
                EXACT,
                max_new_tokens=10,
                dataset="GQA_TestDev_Balanced",
            ),
            "vlmevalkit": vlmevalkit(
                tsv("GQA_TestDev_Balanced"),
                ending(f"\n{BASE}"),
                EXACT,
                dataset="GQA_TestDev_Balanced",
            ),
        },
    ),
)
