"""VQA soft accuracy: agreement with ten people after a fixed cleaning (design: evaluation.md 6)."""

from __future__ import annotations

import re
from collections.abc import Sequence

HUMANS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ONE_TO_TEN = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(value) for value, word in enumerate(_ONE_TO_TEN, start=1)
}
_ARTICLES = {"a", "an", "the"}
# The reference passes a regular-expression flag as the number of replacements; its value is 32.
_STOPS = 32

# Full stops inside numbers stay. The look-behind of the reference is void, so "12.5." and "3." lose
# their last one; VLMEvalKit keeps those as well.
_STOP = re.compile(r"\.(?!\d)")
_STOP_NOT_AFTER_DIGIT = re.compile(r"(?<!\d)\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ONE_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's
    how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've
"""
_TWO_APOSTROPHES = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've
    someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    """Maps misspelled contractions to contractions.

    Most keys are the contraction without its apostrophe, or without one of its two.
    """
    table = {value.replace("'", ""): value for value in _ONE_APOSTROPHE.split()}
    for value in _TWO_APOSTROPHES.split():
        first = value.replace("'", "", 1)
        last = "".join(value.rsplit("'", 1))
        table |= {first: value, last: value}
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return table | {"somebody'd": "somebodyd"}


CONTRACTIONS = _contractions()


def clean(text: str, *, vlmevalkit: bool = False) -> str:
    """Returns the form in which answers are compared.

    Args:
        text: an answer or a prediction.
        vlmevalkit: use VLMEvalKit's variant of the cleaning.
    """
    if not vlmevalkit:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = strip_punctuation(text, vlmevalkit=vlmevalkit).lower().split()
    words = (_NUMBERS.get(word, word) for word in words)
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def strip_punctuation(text: str, *, vlmevalkit: bool = False) -> str:
    """Removes punctuation.

    A mark that stands next to a space anywhere is deleted everywhere; any other mark becomes a
    space. Full stops outside numbers go last.
    """
    joined = vlmevalkit and _COMMA_IN_NUMBER.search(text)
    cleaned = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if joined or beside_space else " ")
    return (_STOP_NOT_AFTER_DIGIT if vlmevalkit else _STOP).sub("", cleaned, count=_STOPS)


def soft_accuracy(prediction: str, answers: Sequence[str], *, vlmevalkit: bool = False) -> float:
    """Returns the mean over the leave-one-out sets of min(1, matching answers / 3).

    Raises:
        ValueError: there are not ten answers; VLMEvalKit takes any number of them.
    """
    if not vlmevalkit and len(answers) != HUMANS:
        raise ValueError(f"VQA accuracy needs {HUMANS} answers, got {len(answers)}")
    prediction = clean(prediction, vlmevalkit=vlmevalkit)
    hits = [clean(answer, vlmevalkit=vlmevalkit) == prediction for answer in answers]
    return sum(min(1.0, (sum(hits) - hit) / 3) for hit in hits) / len(hits)
