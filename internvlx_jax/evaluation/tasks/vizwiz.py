"""VizWiz, validation and test splits: photos and questions of blind people.

The metric is VQA soft accuracy, each protocol with its own cleaning of texts. `internvl` also asks
for "Unanswerable"; `vlmevalkit` reads the column `answers` of its TSV file. The test split writes a
submission.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, listed, tsv
from internvlx_jax.evaluation.submissions import answers_by
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

PROMPT = ending(
    f" When the provided information is insufficient, respond with 'Unanswerable'. {BASE}"
)
VAL = jsonl("vizwiz/vizwiz_val.jsonl", coco="vizwiz/vizwiz_val_annotations.json")

TASKS = (
    Task(
        name="vizwiz_val",
        title="VizWiz, validation",
        samples=4319,
        protocols={
            "internvl": internvl(
                VAL,
                PROMPT,
                scoring.vqa_soft,
                max_new_tokens=10,
                dataset="VizWiz",
                table=lambda question: {"answers": str(list(question.answers))},
            ),
            "vlmevalkit": vlmevalkit(
                tsv("VizWiz", needs=("answers",), finish=listed("answers")),
                ending(f"\n{BASE}"),
                scoring.vqa_soft_vlm,
                dataset="VizWiz",
            ),
        },
    ),
    Task(
        name="vizwiz_test",
        title="VizWiz, test",
        samples=8000,
        protocols={
            "internvl": internvl(
                jsonl("vizwiz/vizwiz_test.jsonl"),
                PROMPT,
                scoring.server,
                max_new_tokens=10,
                submission=answers_by("image"),
            ),
        },
    ),
)
