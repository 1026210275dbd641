"""GQA, test-dev balanced: compositional questions on photos."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

TASKS = (
    Task(name="gqa_testdev", title="GQA, test-dev balanced", samples=12578, views={
        "internvl": internvl(jsonl("gqa/llava_gqa_testdev_balanced_qwen_format.jsonl"), ending(f" {BASE}"), scoring.gqa,
                             max_new_tokens=10, dataset="GQA_TestDev_Balanced"),
        "vlmevalkit": vlmevalkit(tsv("GQA_TestDev_Balanced"), ending(f"\n{BASE}"), scoring.gqa,
                                 dataset="GQA_TestDev_Balanced"),
    }),
)  # fmt: skip
