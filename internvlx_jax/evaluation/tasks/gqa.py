"""GQA, balanced test-dev split: compositional questions on photos, scored by exact match.

`internvl` ignores trailing full stops of a prediction, `vlmevalkit` does not; the protocols also
differ in white space of the prompt.
"""

from collections.abc import Sequence

from internvlx_jax.evaluation.metrics import exact
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.scoring import Answered, Context, Result, mean, mean_of
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def exact_without_stops(prediction: str, answers: Sequence[str]) -> float:
    """Returns `exact` of the prediction without trailing full stops."""
    return exact(prediction.strip().rstrip("."), answers)


def equals(prediction: str, answers: Sequence[str]) -> float:
    """Returns 1 if the lower-case prediction without trailing full stops equals an answer, else 0.

    Blanks count, as in InternVL's script, so that "red ." is not "red".
    """
    return float(prediction.rstrip(".").lower() in answers)


def exact_share(prediction: str, answers: Sequence[str]) -> float:
    """Returns the share of answers that equal the prediction, stripped and in lower case."""
    return mean([exact(prediction, [answer]) for answer in answers])


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores exact matches as InternVL's script does; `gqa_blank` is about "red ."."""
    metric = equals if "gqa_blank" in context.compat else exact_without_stops
    return mean_of(metric)(rows, context)


TASKS = (
    Task(
        name="gqa_testdev",
        title="GQA, test-dev balanced",
        samples=12578,
        protocols={
            "internvl": internvl(
                jsonl("gqa/llava_gqa_testdev_balanced_qwen_format.jsonl"),
                ending(f" {BASE}"),
                score,
                max_new_tokens=10,
                compat=("gqa_blank",),
                dataset="GQA_TestDev_Balanced",
            ),
            "vlmevalkit": vlmevalkit(
                tsv("GQA_TestDev_Balanced", needs=("answer",), finish=listed_answers),
                ending(f"\n{BASE}"),
                mean_of(exact_share),
                dataset="GQA_TestDev_Balanced",
            ),
        },
    ),
)
