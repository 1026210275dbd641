"""ChartQA, test: questions on charts, written by people and by a program; the mean of both is reported."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def _task(name: str, title: str, split: str) -> Task:
    return Task(name=name, title=title, samples=1250, baseline_tiles=12, views={
        "internvl": internvl(jsonl(f"chartqa/{split}.jsonl"), ending(f" {BASE}"), scoring.relaxed, max_new_tokens=100,
                             dataset="ChartQA_TEST", acceptance=("relaxed_swap",)),
        "vlmevalkit": vlmevalkit(
            tsv("ChartQA_TEST", keep=lambda row: row.get("split") == split, finish=listed_answers),
            ending(f"\n{BASE}"), scoring.relaxed, dataset="ChartQA_TEST"),
    })  # fmt: skip


TASKS = (
    _task("chartqa_human", "ChartQA, test, human", "test_human"),
    _task("chartqa_aug", "ChartQA, test, augmented", "test_augmented"),
)
