"""Metric vectors (design: evaluation.md 6)."""

import subprocess
import sys

import pytest

from internvlx_jax.evaluation.metrics import (
    METRICS,
    anls,
    exact,
    levenshtein,
    relaxed,
    soft_accuracy,
)
from internvlx_jax.evaluation.metrics.options import first_option, infer_option, yes_or_no
from internvlx_jax.evaluation.metrics.vqa import clean
from internvlx_jax.evaluation.tasks import mme, pope
from internvlx_jax.evaluation.tasks.gqa import exact_without_stops
from internvlx_jax.evaluation.tasks.hallusionbench import all_right
from internvlx_jax.evaluation.tasks.mathvista import (
    Key,
    internvl_matches,
    internvl_prefetch,
    matches,
    parse,
)
from internvlx_jax.evaluation.tasks.mmbench import all_rotations_right
from internvlx_jax.evaluation.tasks.mmmu import open_answers, open_matches
from internvlx_jax.evaluation.tasks.pope import binary_scores


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("Yes", ["yes"], 1),
        (" yes\n", ["Yes "], 1),
        ("no", ["yes", "NO"], 1),
        ("yes.", ["yes"], 0),
        ("a  b", ["a b"], 0),
        ("", ["yes"], 0),
        ("GIẤY", ["giấy"], 1),
        ("12", ["1"], 0),
        ("1", ["12"], 0),
    ],
)
def test_exact(prediction, answers, score):
    assert exact(prediction, answers) == score


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("helo", ["hello"], 0.8),
        ("abxy", ["abcd"], 0.5),
        ("a b", ["  a  b "], 1.0),  # the vectors of the design page
        ("abcxy", ["abcd"], 0.6),
        ("abxyz", ["abcd"], 0.0),  # 2 and 3 edits of 5: above and below a half
        ("HELLO", ["hello"], 1.0),
        ("a\tb\n", ["a b"], 1.0),
        ("", [""], 1.0),
        ("", ["a"], 0.0),
        ("a", [""], 0.0),
        ("abcd", ["wxyz", "abcx", "abyz"], 0.75),  # the nearest answer counts
        ("  helo ", ["hello"], 1 - 1 / 7),  # the length is that of the raw text
        ("ss", ["ßs"], 1 - 1 / 3),  # ... in upper case, where ß has two letters
        ("RM33.90", ["33.90"], 1 - 2 / 7),
    ],
)
def test_anls(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("abc", "cba", 2),
        ("abcd", "acbd", 2),
        ("total", "total", 0),
        ("a", "b", 1),
    ],
)
def test_levenshtein(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


@pytest.mark.parametrize(
    "prediction, answer, right, swapped",
    [
        ("9.5", "10", 1, 0),
        ("10.52", "10", 0, 1),
        ("0", "5", 0, 0),
        ("50%", "0.5", 1, 1),
        ("0.0", "0", 0, 0),
        ("1,000", "1000", 0, 0),
        (" Total ", "total", 1, 1),
        ("0", "0", 1, 1),
        ("-10", "10", 0, 0),
        ("5%", "5", 0, 0),
    ],
)
def test_relaxed(prediction, answer, right, swapped):
    assert relaxed(prediction, [answer]) == right
    assert relaxed(prediction, [answer], swap=True) == swapped
    assert relaxed(prediction, ["other", answer]) == right, "the best of several answers counts"


def test_gqa_ignores_trailing_full_stops():
    assert exact_without_stops("Red..", ["red"]) == 1 and exact_without_stops("r.ed", ["red"]) == 0


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("The  Dog.", "dog"),
        ("$1,000", "$1000"),
        ("3.50", "3.50"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("a/b", "b"),
        ("top-left", "top left"),
        ("top - left", "top left"),
        ("it's", "it 's"),
        ("dont", "don't"),
        ("none", "0"),
        ("12.5.", "12.5"),
        ("Aug. 5, 2010", "aug 5 2010"),
        ("let's go", "let 's go"),  # those of the design page
        ("a\nb\tc", "b c"),
        ("Ten", "10"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("somebody'd", "somebodyd"),
        ("ow's'at", "ow 's'at"),
        ("." * 33 + "x", ".x"),  # only 32 full stops go
        ("x- y-z", "x yz"),  # one mark next to a space deletes them all
    ],
)
def test_cleaning_of_vqa(text, cleaned):
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("3.", "3."),
        ("12.5.", "12.5."),
        ("the end.", "end"),
        ("it's", "it's"),
        ("1,000 a-b", "1000 ab"),
        ("a,b", "b"),
        ("Why?", "why"),
    ],
)
def test_cleaning_of_vqa_in_vlmevalkit(text, cleaned):
    """A full stop behind a digit and 's stay; a comma between digits deletes all marks."""
    assert clean(text, vlmevalkit=True) == cleaned


@pytest.mark.parametrize(
    "prediction, answers, score",
    [
        ("yes", ["yes"] * 4 + ["no"] * 6, 1),
        ("no", ["yes"] * 4 + ["no"] * 6, 1),
        ("b", ["b"] + ["c"] * 9, 0.3),
        ("x", ["x"] * 2 + ["y"] * 3 + ["z"] * 5, 0.6),
        ("y", ["x"] * 2 + ["y"] * 3 + ["z"] * 5, 0.9),
        ("z", ["x"] * 2 + ["y"] * 3 + ["z"] * 5, 1),
        ("w", ["x"] * 10, 0),
        ("The X.", ["x"] * 10, 1),
    ],
)
def test_soft_accuracy(prediction, answers, score):
    assert soft_accuracy(prediction, answers) == pytest.approx(score)
    assert soft_accuracy(prediction, answers[::-1], vlmevalkit=True) == pytest.approx(score)


def test_soft_accuracy_needs_ten_answers():
    with pytest.raises(ValueError, match="10 answers, got 9"):
        soft_accuracy("x", ["x"] * 9)


OPTIONS = {"A": "a red car", "B": "blue bus", "C": "tree", "D": "none of these"}


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B.", "B"),
        ("(C)", "C"),
        ("The answer is B", "B"),
        ("It is a blue bus", "B"),
        ("A blue bus", "A"),
        ("A or B", None),
        ("B because it is big and long and wide", None),
        ("a red car and a tree", None),  # those of the design page
        ("Sorry, I can't help with images of people yet.", "Z"),
        ("Z", "Z"),
        ("Z or A", "A"),
        ("", None),
        ("A or B? In the end the correct answer is **B**, or not", "B"),
        ("A, B: the answer is X", None),
        ("tree " * 30, None),  # longer than twice all options
    ],
)
def test_option_inference(answer, letter):
    assert infer_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        (" B ", "B"),
        ("B. blue bus", "B"),
        ("Blue bus", "B"),
        ("the tree", "C"),
        ("blue bus or tree", "B"),
        ("E", "E"),
        ("maybe", "maybe"),
        ("", ""),
        ("A red one", "A"),
    ],
)
def test_first_option(answer, letter):
    """A leading capital is taken as a letter, whatever follows; else the first option counts."""
    assert first_option(answer, OPTIONS) == letter


def test_circular_needs_all_rotations():
    assert all_rotations_right(
        [3, 1_000_003, 2_000_003, 4, 1_000_004], [True, True, False, True, True]
    ) == {
        3: False,
        4: True,
    }


@pytest.mark.parametrize(
    "text, label",
    [
        ("Yes, it is", "yes"),
        ("No", "no"),
        ("know", "no"),
        ("The answer is yes", "other"),
        ("是否", "yes"),
        ("不是", "no"),
        ("是", "yes"),
        ("True", "yes"),
        ("FALSE", "no"),
        ("图片Yes", "yes"),
        ("", "other"),
        ("\nYes", "yes"),
        ("否", "no"),
    ],
)
def test_mme_labels(text, label):
    assert mme.label(text) == label


def test_mme_scores_by_hand():
    """color: 3 of 4 right, one of two images whole: 75 + 50; count: 1 of 2 and none: 50 + 0."""
    tasks = ["color"] * 4 + ["count"] * 2 + ["code_reasoning"] * 2
    scores = mme.task_scores(tasks, [True, True, True, False, True, False, True, True])
    assert scores == {
        "color": 125,
        "count": 50,
        "code_reasoning": 200,
        "perception": 175,
        "cognition": 200,
    }
    assert mme.task_scores(["count"] * 3, [True, True, False])["count"] == pytest.approx(
        200 / 3 + 100
    )
    assert mme.task_scores(["count"], [True])["count"] == 100


@pytest.mark.parametrize(
    "text, label",
    [
        ("No, there is not.", "no"),
        ("Yes", "yes"),
        ("not really", "no"),
        ("It is. No", "yes"),
        ("nothing", "yes"),
        ("no,", "no"),
        ("NO", "yes"),
        ("There is no dog", "no"),
        ("", "yes"),
        ("yes\nno", "yes"),
    ],
)
def test_pope_labels(text, label):
    """Only the text before the first full stop, these spellings and single spaces count."""
    assert pope.label(text) == label


def test_pope_arithmetic():
    """The check of the design page: TP 1256, FP 39, TN 1371, FN 244."""
    predicted = [True] * (1256 + 39) + [False] * (1371 + 244)
    keys = [True] * 1256 + [False] * 39 + [False] * 1371 + [True] * 244
    scores = binary_scores(predicted, keys)
    assert {name: round(value, 4) for name, value in scores.items()} == {
        "accuracy": 0.9027,
        "precision": 0.9699,
        "recall": 0.8373,
        "f1": 0.8987,
        "yes_ratio": 0.4450,
    }
    assert binary_scores([False], [True])["f1"] == 0


@pytest.mark.parametrize(
    "text, label",
    [
        ("Yes.", "Yes"),
        ("No, never", "No"),
        ("yes or no", None),
        ("maybe", None),
        ("YES!", "Yes"),
        ("yesterday", None),
    ],
)
def test_yes_or_no(text, label):
    assert yes_or_no(text) == label


def test_all_right_is_by_group():
    assert all_right(["a", "a", "b", "c"], [True, False, True, True]) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "text, stated",
    [
        ("So the answer is 3.14159 m.", {"3.14159 m", 3.14}),
        ("x = 1,234", {1234.0, 234.0}),
        ("The result is 2e3.", {2000.0, 3.0}),
        ("Therefore $5.50 is final", {"final"}),  # those of the design page
        ("5", {5.0}),
        ("a", {" a", "a "}),
        ("It is blue\nx = 7", {"blue", 7.0}),
        ("x = 7\nnothing", {"x = 7\nnothing", 7.0}),
        ("the answer is :", {"the answer is :"}),
    ],
)
def test_open_answers_of_mmmu(text, stated):
    assert open_answers(text) == stated


@pytest.mark.parametrize(
    "text, keys, right",
    [
        ("The answer is 3.141", ["3.14"], True),
        ("The answer is 3.2", ["3.14"], False),
        ("so it is Blue.", ["blue"], True),
        ("it is bluish", ["blue"], False),
        ("it is the dark blue one", ["green", "dark blue"], True),
        ("1,000", ["1000"], True),
        ("it is a", ["A"], True),
        ("it is cat", ["a"], False),
    ],
)
def test_open_matches_of_mmmu(text, keys, right):
    assert open_matches(text, keys) == right


INTEGER = Key("free_form", "integer", "3")
FLOAT = Key("free_form", "float", "1.50", precision=2)
TEXT = Key("free_form", "text", "red")
CHOICE = Key("multi_choice", "text", "1/2", ("3/4", "1/2"), "B")


@pytest.mark.parametrize(
    "text, key, parsed, right",
    [
        ("3", INTEGER, 3, True),
        ("4", INTEGER, 4, False),
        ("3.0", INTEGER, None, False),
        ("three", INTEGER, None, False),
        ("0", INTEGER, 0, False),
        ("1.5", FLOAT, 1.5, True),
        ("1.51", FLOAT, 1.51, False),
        ("(B)", CHOICE, "B", True),
        ("3/4", CHOICE, "A", False),
        ("red", TEXT, None, False),
    ],
)
def test_mathvista_in_vlmevalkit(text, key, parsed, right):
    assert parse(text, key, text_bug=True) == parsed
    assert matches(parsed, key) == right


def test_mathvista_texts_match_without_the_bug():
    assert matches(parse(" red ", TEXT, text_bug=False), TEXT)


@pytest.mark.parametrize(
    "extraction, key, right",
    [
        ("(b) 1/2", CHOICE, True),
        ("A", CHOICE, False),
        ("1/3", CHOICE, True),
        ("3.7", INTEGER, True),
        ("x", INTEGER, False),
        ("1.499", Key("free_form", "float", "1.5", precision=2), True),
        ("1.501", FLOAT, False),
        ("red", TEXT, True),
    ],
)
def test_mathvista_in_internvl(extraction, key, right):
    """int(float(x)) cuts, round() loses the zero of "1.50", a text picks the nearest choice."""
    assert internvl_matches(extraction, key) == right


def test_mathvista_prefetch_in_internvl():
    cases = (
        ("1/2", CHOICE),
        ("B", CHOICE),
        ("12", INTEGER),
        ("1.0", INTEGER),
        ("2", FLOAT),
        ("red", TEXT),
    )
    assert [internvl_prefetch(*case) for case in cases] == ["1/2", None, "12", None, "2.0", None]


def test_the_table_names_the_metrics_of_single_answers():
    assert {"exact": exact, "anls": anls, "relaxed": relaxed, "vqa": soft_accuracy} == METRICS


def test_metrics_and_tasks_import_no_jax():
    code = (
        "import sys, internvlx_jax.evaluation.scoring, internvlx_jax.evaluation.tasks; "
        "print('jax' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "False\n"
    )
