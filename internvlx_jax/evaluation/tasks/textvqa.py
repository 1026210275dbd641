"""TextVQA: text in photos."""

from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.sources import coco_answers, jsonl, listed_answers, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

ANSWERS = ("textvqa/textvqa_val_annotations.json", coco_answers)


def _view(file: str):
    return internvl(
        jsonl(file, annotations=ANSWERS),
        ending(f" {BASE}"),
        scoring.vqa_soft,
        max_new_tokens=10,
        dataset="TextVQA_VAL",
    )


TASKS = (
    Task(name="textvqa_val", title="TextVQA, validation", samples=5000, views={
        "internvl": _view("textvqa/textvqa_val.jsonl"),
        "vlmevalkit": vlmevalkit(tsv("TextVQA_VAL", finish=listed_answers), ending(f"\n{BASE}"), scoring.vqa_soft_vlm,
                                 dataset="TextVQA_VAL"),
    }),
    Task(name="textvqa_val_ocr", title="TextVQA, validation, OCR text in the question", samples=5000, views={
        "internvl": _view("textvqa/textvqa_val_llava.jsonl"),
    }),
)  # fmt: skip
