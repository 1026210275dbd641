"""VQAv2, validation and test-dev splits: short questions on photos, by VQA soft accuracy.

VLMEvalKit has no TSV file of this benchmark, so both protocols ask the questions of InternVL's data
folder, each with its own cleaning of texts. test-dev has no public references and writes a
submission.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl
from internvlx_jax.evaluation.submissions import answers_by
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

VAL = jsonl("vqav2/vqav2_val.jsonl", coco="vqav2/v2_mscoco_val2014_annotations.json")
TESTDEV = jsonl("vqav2/vqav2_testdev.jsonl")
SUBMISSION = answers_by("question_id")

TASKS = (
    Task(
        name="vqav2_val",
        title="VQAv2, validation",
        samples=214354,
        protocols={
            "internvl": internvl(VAL, ending(f" {BASE}"), scoring.vqa_soft, max_new_tokens=10),
            "vlmevalkit": vlmevalkit(VAL, ending(f"\n{BASE}"), scoring.vqa_soft_vlm, dataset=""),
        },
    ),
    Task(
        name="vqav2_testdev",
        title="VQAv2, test-dev",
        samples=107394,
        protocols={
            "internvl": internvl(
                TESTDEV,
                ending(f" {BASE}"),
                scoring.server,
                max_new_tokens=10,
                submission=SUBMISSION,
            ),
            "vlmevalkit": vlmevalkit(
                TESTDEV,
                ending(f"\n{BASE}"),
                scoring.server,
                dataset="",
                submission=SUBMISSION,
            ),
        },
    ),
)
