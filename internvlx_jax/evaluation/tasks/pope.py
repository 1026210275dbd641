"""POPE: is an object in the photo? Random, popular and adversarial objects."""

import dataclasses
from collections import defaultdict

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.prompts import ending, plain
from internvlx_jax.evaluation.questions import Question, read_jsonl
from internvlx_jax.evaluation.sources import Roots, Source, image_path, jsonl, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

QUESTIONS = jsonl("pope/llava_pope_test.jsonl", text="text")
CATEGORIES = ("random", "popular", "adversarial")


def _labels(category: str) -> str:
    return f"pope/coco/coco_pope_{category}.json"


def _read(roots: Roots) -> list[Question]:
    """Labels belong to the questions of their category in the order of both files."""
    members: dict[str, list[Question]] = defaultdict(list)
    for question in QUESTIONS.read(roots):
        images = tuple(
            image_path(f"pope/val2014/{path.rpartition('/')[2]}", roots) for path in question.images
        )
        members[question.fields["category"]].append(dataclasses.replace(question, images=images))
    questions = []
    for category in CATEGORIES:
        path = roots.data / _labels(category)
        labels = [row["label"] for _, row in read_jsonl(path)]
        if len(labels) != len(members[category]):
            raise ConfigError(
                f"{path}: {len(labels)} labels, but {len(members[category])} questions of this category "
                "in llava_pope_test.jsonl; both files must be of one release"
            )
        questions += [
            dataclasses.replace(question, answers=(label,))
            for question, label in zip(members[category], labels)
        ]
    return questions


SOURCE = Source(
    lambda roots: [*QUESTIONS.files(roots), *(roots.data / _labels(name) for name in CATEGORIES)],
    _read,
)

TASKS = (
    Task(name="pope", title="POPE, mean F1", samples=8910, views={
        "internvl": internvl(SOURCE, ending(" "), scoring.pope, max_new_tokens=100, dataset="POPE"),
        "vlmevalkit": vlmevalkit(tsv("POPE"), plain, scoring.pope_vlm, dataset="POPE"),
    }),
)  # fmt: skip
