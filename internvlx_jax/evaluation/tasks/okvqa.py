"""OK-VQA, validation split: questions that need knowledge from outside the image.

The metric is VQA soft accuracy, each protocol with its own cleaning of texts. VLMEvalKit has no TSV
file of this benchmark, so both protocols ask the questions of InternVL's data folder.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

SOURCE = jsonl("okvqa/okvqa_val.jsonl", coco="okvqa/mscoco_val2014_annotations.json")

TASKS = (
    Task(
        name="okvqa_val",
        title="OK-VQA, validation",
        samples=5046,
        protocols={
            "internvl": internvl(SOURCE, ending(f" {BASE}"), scoring.vqa_soft, max_new_tokens=10),
            "vlmevalkit": vlmevalkit(SOURCE, ending(f"\n{BASE}"), scoring.vqa_soft_vlm, dataset=""),
        },
    ),
)
