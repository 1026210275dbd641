"""16,679 predictions get the scores that the references' own functions give them.

(design: evaluation.md 6) `tests/golden/scores/README.md` says how the file came about.
"""

import gzip
import json
from functools import cache

import pytest
from mini_data import ROOT

from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.judge import NoJudge
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context
from internvlx_jax.evaluation.selection import compat_of
from internvlx_jax.evaluation.tasks import TASKS
from internvlx_jax.evaluation.tasks.mathvista import Key, judge_prompt

FOLDER = ROOT / "tests" / "golden" / "scores"
KINDS = {
    "vqa": ("textvqa_val", "okvqa_val", "vqav2_val", "vizwiz_val"),
    "anls": ("docvqa_val", "infovqa_val"),
    "chart": ("chartqa_human", "chartqa_aug"),
    "gqa": ("gqa_testdev",),
    "mcq": ("ai2d_test", "scienceqa", "seed", "realworldqa", "mmbench_dev_en"),
    "yn": ("mme", "pope", "hallusionbench"),
    "mathvista": ("mathvista",),
    "mmmu": ("mmmu_val",),
}


@cache
def rows_of(kind: str) -> list[dict]:
    with gzip.open(FOLDER / f"{kind}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def question(kind: str, row: dict, number: int) -> Question:
    """A row as a question, with the fields that scorers group by."""
    id, fields = number, {}
    answers = row.get("answers") or [row["answer"]]
    if kind == "mcq":
        fields = {"question_type_id": 1, "category": "c", "l2-category": "d"}
    elif kind == "yn":
        id = f"image_VD_map_{number}_{number}_{number}"
        fields = {"category": "color", "l2-category": "map", "image_path": str(number)}
    elif kind == "mmmu":
        type = "multiple-choice" if row.get("options") else "open"
        fields = {"question_type": type, "subject": "Art", "category": "Art"}
    elif kind == "mathvista":
        choices = tuple(row["choices"] or ())
        letter = "ABCDEFGH"[choices.index(row["answer"])] if row["answer"] in choices else ""
        types = row["question_type"], row["answer_type"], row["answer"]
        fields = {"key": Key(*types, choices, letter, int(row["precision"] or 0))}
    options = row.get("options") or {}
    return Question(
        f"{kind} {row['id']}", id, (), row["question"], tuple(answers), "", options, fields
    )


class Echo:
    """A judge that repeats the answer that it is asked about."""

    def __init__(self, rows, prompt):
        self.replies = {judge_prompt(row, prompt): row.text for row in rows}

    def ask(self, requests):
        return [self.replies[request.prompt] for request in requests]

    def describe(self):
        return {"model": "echo"}


def test_all_rows_are_in():
    assert sum(len(rows_of(kind)) for kind in KINDS) == 16_679


@pytest.mark.parametrize("release", [False, True], ids=["main", "release"])
@pytest.mark.parametrize("protocol", ["internvl", "vlmevalkit"])
@pytest.mark.parametrize("kind, name", [(kind, name) for kind in KINDS for name in KINDS[kind]])
def test_every_score_equals_the_reference(kind, name, protocol, release):
    stored = rows_of(kind)
    column = f"{name}/{protocol}" + "@release" * release
    spec = TASKS[name].protocols.get(protocol)
    if column not in stored[0]["expected"]:
        assert spec is None or release, "every protocol has golden scores"
        return
    rows = [
        Answered(question(kind, row, number), row["prediction"])
        for number, row in enumerate(stored)
    ]
    selection = EvaluationConfig(tasks=name, compat="release" if release else None)
    prompt = "mathvista" if protocol == "vlmevalkit" else "mathvista_internvl"
    judge = Echo(rows, prompt) if kind == "mathvista" else NoJudge()
    scores = spec.score(rows, Context(judge, compat_of(selection, spec))).scores
    different = [
        (row["id"], row["prediction"], score, row["expected"][column])
        for row, score in zip(stored, scores, strict=True)
        if score != pytest.approx(row["expected"][column], abs=1e-12)
    ]
    assert not different
