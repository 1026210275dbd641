"""Metric vectors (spec: evaluation.md 6)."""

import subprocess
import sys

import pytest

from internvlx_jax.evaluation.metrics import METRICS, anls, exact, levenshtein


@pytest.mark.parametrize("prediction, answers, score", [
    ("Yes", ["yes"], 1), (" yes\n", ["Yes "], 1), ("no", ["yes", "NO"], 1), ("yes.", ["yes"], 0),
    ("a  b", ["a b"], 0), ("", ["yes"], 0), ("GIẤY", ["giấy"], 1), ("12", ["1"], 0), ("1", ["12"], 0),
])  # fmt: skip
def test_exact(prediction, answers, score):
    assert exact(prediction, answers) == score


@pytest.mark.parametrize("prediction, answers, score", [
    ("helo", ["hello"], 0.8), ("abxy", ["abcd"], 0.5), ("a b", ["  a  b "], 1.0),  # the vectors of the specification
    ("abcxy", ["abcd"], 0.6), ("abxyz", ["abcd"], 0.0),  # 2 and 3 edits of 5: above and below a half
    ("HELLO", ["hello"], 1.0), ("a\tb\n", ["a b"], 1.0), ("", [""], 1.0), ("", ["a"], 0.0), ("a", [""], 0.0),
    ("abcd", ["wxyz", "abcx", "abyz"], 0.75),  # the nearest answer counts
    ("  helo ", ["hello"], 1 - 1 / 7),  # the length is that of the raw text
    ("ss", ["ßs"], 1 - 1 / 3),  # ... in upper case, where ß has two letters
    ("RM33.90", ["33.90"], 1 - 2 / 7),
])  # fmt: skip
def test_anls(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score)


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "cba", 2), ("abcd", "acbd", 2),
    ("total", "total", 0), ("a", "b", 1),
])  # fmt: skip
def test_levenshtein(a, b, distance):
    assert levenshtein(a, b) == levenshtein(b, a) == distance


def test_the_table_names_both():
    assert METRICS == {"exact": exact, "anls": anls}


def test_metrics_import_no_jax():
    code = "import sys, internvlx_jax.evaluation.metrics; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
