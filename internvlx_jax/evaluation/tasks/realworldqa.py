"""RealWorldQA: choices on photos, many from vehicles."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import vlm_choice
from internvlx_jax.evaluation.sources import tsv
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit

TASKS = (
    Task(name="realworldqa", title="RealWorldQA", samples=765, views={
        "vlmevalkit": vlmevalkit(tsv("RealWorldQA"), vlm_choice, scoring.vanilla_choice, dataset="RealWorldQA"),
    }),
)  # fmt: skip
