"""Scores of whole tasks, computed by hand, and perfect answers to every benchmark.

(design: evaluation.md 6)
"""

import dataclasses

import pytest
from scripted_judge import Scripted

from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.judge import NoJudge
from internvlx_jax.evaluation.metrics import exact
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.tasks import (
    TASKS,
    chartqa,
    hallusionbench,
    llavabench,
    mathvista,
    mmbench,
    mme,
    mmmu,
    mmvet,
    pope,
    seed,
)
from internvlx_jax.evaluation.tasks.mathvista import Key

OPTIONS = {"A": "cat", "B": "dog"}


def row(text, answer, id=0, error=None, options=None, question="What?", **fields):
    return Answered(
        Question("here", id, (), question, (answer,), options=options or {}, fields=fields),
        text,
        error,
    )


def score(scorer, rows, judge=None, compat=()):
    return scorer(rows, Context(judge or NoJudge(), frozenset(compat)))


ALL = [(name, protocol) for name, task in TASKS.items() for protocol in task.protocols]
JUDGED = {"mmvet", "llavabench", *(name for name in TASKS if name.startswith("mathverse"))}
PERFECT = {"mme": 2800, "pope": 1, "ocrbench": 1000}


@pytest.mark.parametrize("name, protocol", ALL)
def test_perfect_answers_reach_the_top_and_failures_the_bottom(name, protocol, data_root):
    """So the references reach the metric, from the files of each layout."""
    (spec,) = select(
        EvaluationConfig(tasks=name, protocol=protocol, data_root=str(data_root), compat="none")
    )
    if not spec.questions[0].answers:
        assert spec.protocol_spec.submission is not None
        return
    best = [Answered(question, question.answers[0]) for question in spec.questions]
    failed = [dataclasses.replace(row, error="unreadable") for row in best]
    if name in JUDGED:
        replies = {"mmvet": ["1"] * len(best), "llavabench": ["8 8"] * len(best)}
        judge = Scripted(*replies.get(name, [row.text for row in best]))
        assert score(spec.protocol_spec.score, best, judge).score == 100
        assert score(spec.protocol_spec.score, best).pending
        return
    if "MMBench_TEST" in spec.protocol_spec.dataset:
        assert score(spec.protocol_spec.score, best).score is None
        return
    for scored, expected in (
        (score(spec.protocol_spec.score, best), PERFECT.get(name, 100)),
        (score(spec.protocol_spec.score, failed), 0),
    ):
        assert scored.score == pytest.approx(expected)
        counted = [name != "mmmu_val" or row.question.fields.get("split") != "dev" for row in best]
        assert [value is not None for value in scored.scores] == counted
        assert all(value == (expected > 0) for value in scored.scores if value is not None)


def test_mmbench_counts_questions_not_rotations():
    rows = [
        row("A", "A", 1, options=OPTIONS, category="x", **{"l2-category": "p"}),
        row("A", "B", 1_000_001, options=OPTIONS, category="x", **{"l2-category": "p"}),
        row("the dog", "B", 2, options=OPTIONS, category="y", **{"l2-category": "p"}),
    ]
    result = score(mmbench.circular, rows)
    assert (result.score, result.scores, list(result.predictions)) == (
        50,
        [1, 0, 1],
        ["A", "A", "B"],
    )
    assert result.parts == {
        "questions": 2,
        "one_rotation": pytest.approx(200 / 3),
        "l2-category": {"p": 50},
        "category": {"x": 0, "y": 100},
    }


def test_options_that_rules_do_not_find_go_to_the_judge():
    rows = [
        row("B", "B", options=OPTIONS, category="c"),
        row("the pet that barks", "B", options=OPTIONS, category="d"),
    ]
    alone = score(scoring.vanilla_choice, rows)
    assert alone.score == 50 and alone.notes == [
        "1 answers state no option by the rules and count as wrong; a judge would read them"
    ]
    judge = Scripted("B")
    judged = score(scoring.vanilla_choice, rows, judge)
    assert (judged.score, judged.notes, judged.parts) == (100, [], {"c": 100, "d": 100})
    (request,) = judge.requests
    assert request.prompt.endswith(
        "Question: What??\nOptions: There are several options: \nA. cat\nB. dog\n\n"
        "Answer: the pet that barks\nYour output: "
    )
    chinese = Scripted("Z")
    score(scoring.vanilla_choice, [row("x y", "B", options=OPTIONS, question="什么")], chinese)
    assert chinese.requests[0].prompt.startswith("你是一个帮助我匹配答案")


def test_seed_reports_images():
    rows = [
        row("A", "A", question_type_id=1),
        row("A. cat", "B", question_type_id=9),
        row("B", "B", question_type_id=10),
    ]
    result = score(seed.first_character, rows)
    assert result.score == 50
    assert result.parts == {
        "image": 50,
        "video": 100,
        "total": pytest.approx(200 / 3),
        "by_type": {"1": 100, "9": 0, "10": 100},
    }


def test_mmmu_by_subject_and_domain():
    rows = [
        row("B", "B", options=OPTIONS, question_type="multiple-choice", subject="Art"),
        row("cat", "B", options=OPTIONS, question_type="multiple-choice", subject="Math"),
        row("so it is 3.141", "3.14", question_type="open", subject="Physics"),
    ]
    result = score(mmmu.score, rows)
    assert result.score == pytest.approx(200 / 3)
    assert result.parts == {
        "subjects": {"Art": 100, "Math": 0, "Physics": 100},
        "domains": {"Art and Design": 100, "Science": 50},
    }


def test_mmmu_open_questions_of_vlmevalkit_are_choices():
    rows = [row("7", "7", category="Math"), row("9", "7", category="Math")]
    assert score(mmmu.score_vlm, rows).score == 50


def test_pope_is_the_mean_of_its_categories():
    """random: TP 1, FN 1 -> F1 2/3; popular: TP 1, FP 1 -> F1 2/3; adversarial: no yes -> 0."""
    rows = [
        row("Yes", "yes", category="random"),
        row("no", "yes", category="random"),
        row("Yes", "yes", category="popular"),
        row("Yes", "no", category="popular"),
        row("no", "yes", category="adversarial"),
        row("no", "no", category="adversarial"),
    ]
    result = score(pope.score, rows)
    assert result.score == pytest.approx(4 / 9)
    assert result.parts["popular"] == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1,
        "f1": pytest.approx(2 / 3),
        "yes_ratio": 1,
    }


def test_pope_of_vlmevalkit_counts_a_row_in_each_of_its_categories():
    """TP 2 (one row twice), FN 1: precision 1, recall 2/3, F1 0.8."""
    rows = [
        row("Yes", "Yes", category="random,popular"),
        row("No.", "Yes", category="random"),
        row("No", "No", category="popular"),
    ]
    result = score(pope.score_vlm, rows)
    assert result.score == pytest.approx(0.8)
    assert result.parts["random"]["recall"] == 0.5 and result.parts["popular"]["f1"] == 1


def test_mme_adds_both_halves():
    rows = [
        row(text, answer, category=kind)
        for kind, text, answer in (
            ("color", "Yes", "Yes"),
            ("color", "No", "No"),
            ("code_reasoning", "Yes", "Yes"),
            ("code_reasoning", "Yes", "No"),
        )
    ]
    result = score(mme.score, rows)
    assert (result.score, result.parts["perception"], result.parts["cognition"]) == (250, 200, 50)


def test_hallusionbench_by_hand():
    """Rows 3 of 4 right; figures: (0, 0) wrong, (0, 1) right; questions: 1 wrong, 2 right."""
    rows = [
        row(text, answer, f"image_VD_map_0_{figure}_{question}", **{"l2-category": "map"})
        for text, answer, figure, question in (
            ("Yes", "Yes", 0, 1),
            ("No", "Yes", 0, 1),
            ("No", "No", 1, 2),
            ("yes!", "Yes", 1, 2),
        )
    ]
    result = score(hallusionbench.score, rows)
    assert result.parts == {"aAcc": 75, "fAcc": 50, "qAcc": 50}
    assert result.score == pytest.approx(175 / 3)


def test_unclear_yes_or_no_goes_to_the_judge():
    rows = [row("It is so", "Yes", "i_VD_map_0_0_0", **{"l2-category": "map"})]
    assert score(hallusionbench.score, rows).score == 0
    judge = Scripted("Yes")
    assert score(hallusionbench.score, rows, judge).score == 100
    assert judge.requests[0].prompt.endswith("Question: What??\nAnswer: It is so\nYour output: ")


def test_chartqa_swap():
    rows = [row("9.5", "10"), row("10.52", "10")]
    assert score(chartqa.relaxed_accuracy, rows).scores == [1, 0]
    assert score(chartqa.relaxed_accuracy, rows, compat=["relaxed_swap"]).scores == [0, 1]


def test_mathvista_prefetches_what_rules_read():
    """3 is read by rule; 0 counts as not read and goes to the judge, as does a sentence."""
    keys = [
        Key("free_form", "integer", "3"),
        Key("free_form", "integer", "0"),
        Key("free_form", "float", "1.5"),
    ]
    rows = [row(text, key.answer, key=key) for text, key in zip(("3", "0", "it is 1.5"), keys)]
    alone = score(mathvista.score_vlm, rows)
    assert alone.pending and alone.score is None and alone.scores == [1, None, None]
    assert alone.parts == {
        "prefetch_rate": pytest.approx(1 / 3),
        "without_judge": pytest.approx(100 / 3),
    }
    judge = Scripted("0", "1.5")
    judged = score(mathvista.score_vlm, rows, judge)
    assert (judged.score, judged.pending, list(judged.predictions)) == (
        100,
        False,
        ["3", "0", "1.5"],
    )
    assert all(request.max_tokens == 128 for request in judge.requests)
    text = [row("red", "red", key=Key("free_form", "text", "red"))]
    assert score(mathvista.score_vlm, text).score == 100
    assert score(mathvista.score_vlm, text, Scripted("red"), ["mathvista_text_bug"]).score == 0


def test_mmvet_asks_until_there_is_a_number():
    rows = [
        row("a", "x<AND>y", category="rec"),
        row("b", "z", category="rec,ocr"),
        row("c", "z", error="e", category="ocr"),
        row("d", "z", category="math"),
    ]
    judge = Scripted("0.5", "good", "2", "1.0", "no", "0.25", *["?"] * 3)
    result = score(mmvet.score, rows, judge)
    assert result.scores == [0.5, 1.0, 0, 0.25] and result.score == pytest.approx(43.75)
    assert result.parts == {"math": 25, "ocr": 50, "rec": 75}
    assert [(r.temperature, r.attempt) for r in judge.requests] == [(0, 0)] * 3 + [(0.5, 1)] * 2 + [
        (1.0, 2)
    ]
    unreadable = score(mmvet.score, rows[:1], Scripted(*["?"] * 5))
    assert unreadable.score == 0 and unreadable.notes == [
        "the judge gave no number for 1 answers; they count 0"
    ]


def test_llavabench_relates_to_the_reference():
    rows = [
        row("a", "r", category="conv", caption="c"),
        row("b", "r", category="detail", caption="c"),
        row("c", "r", category="conv", caption="{question}"),
    ]
    judge = Scripted("8 6\nbecause", "10, 5", "none", "again", "no")
    result = score(llavabench.score, rows, judge)
    assert result.score == pytest.approx(100 * 11 / 18) and result.scores == [6, 5, None]
    assert result.parts["conv"] == {"relative": 75, "reference": 80, "model": 60}
    assert result.notes == ["1 judgments could not be read; these questions are left out"]
    assert "[Context]\n{question}\n" in judge.requests[2].prompt, "braces in the data stay"
    kept = score(llavabench.score, rows, Scripted("8 6", "10 5", "none"), ["llavabench_minus1"])
    assert kept.score == pytest.approx(100 * 10 / 17) and kept.scores == [6, 5, -1]


def test_a_missing_answer_names_its_line():
    bare = Answered(Question("file line 3", 0, (), "?", ()), "x")
    with pytest.raises(ValueError, match="file line 3: no answer to compare with"):
        score(scoring.mean_of(exact), [bare])
    with pytest.raises(ValueError, match="here: VQA accuracy needs 10 answers, got 1"):
        score(scoring.vqa_soft, [row("x", "x")])
