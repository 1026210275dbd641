"""HallusionBench: yes or no questions on images that mislead."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TASKS = (
    Task(name="hallusionbench", title="HallusionBench, mean of aAcc, fAcc, qAcc", samples=951, views={
        "vlmevalkit": vlmevalkit(tsv("HallusionBench"), ending(f" Please answer yes or no. {BASE}"),
                                 scoring.hallusionbench, dataset="HallusionBench"),
    }),
)  # fmt: skip
