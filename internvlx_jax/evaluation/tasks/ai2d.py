"""AI2D, test: choices on diagrams."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import plain, vlm_choice
from internvlx_jax.evaluation.sources import jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

TASKS = (
    Task(name="ai2d_test", title="AI2D, test", samples=3088, views={
        # Options and instruction are part of the question in this file.
        "internvl": internvl(jsonl("ai2diagram/test_vlmevalkit.jsonl"), plain, scoring.exact, max_new_tokens=10,
                             dataset="AI2D_TEST"),
        "vlmevalkit": vlmevalkit(tsv("AI2D_TEST"), vlm_choice, scoring.vanilla_choice, dataset="AI2D_TEST"),
    }),
)  # fmt: skip
