"""TextVQA, validation split: questions on text in photos, scored by VQA soft accuracy.

Each protocol has its own cleaning of texts. `textvqa_val_ocr` adds the OCR text to the question, as
LLaVA does.
"""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import jsonl, listed_answers, tsv
from internvlx_jax.evaluation.tasks.task import ProtocolSpec, Task, internvl, vlmevalkit


def _internvl(file: str) -> ProtocolSpec:
    return internvl(
        jsonl(file, coco="textvqa/textvqa_val_annotations.json"),
        ending(f" {BASE}"),
        scoring.vqa_soft,
        max_new_tokens=10,
        dataset="TextVQA_VAL",
    )


TASKS = (
    Task(
        name="textvqa_val",
        title="TextVQA, validation",
        samples=5000,
        protocols={
            "internvl": _internvl("textvqa/textvqa_val.jsonl"),
            "vlmevalkit": vlmevalkit(
                tsv("TextVQA_VAL", needs=("answer",), finish=listed_answers),
                ending(f"\n{BASE}"),
                scoring.vqa_soft_vlm,
                dataset="TextVQA_VAL",
            ),
        },
    ),
    Task(
        name="textvqa_val_ocr",
        title="TextVQA, validation, OCR text in the question",
        samples=5000,
        protocols={
            "internvl": _internvl("textvqa/textvqa_val_llava.jsonl"),
        },
    ),
)
