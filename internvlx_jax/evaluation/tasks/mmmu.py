"""MMMU, validation split: college questions with several images, in thirty subjects.

The metric is accuracy, also per subject and domain. `internvl` reads the parquet files of the hub,
puts all images into one grid, and matches open answers by their texts and numbers. `vlmevalkit`
reads a TSV file, doubles the first image, and makes an open question a choice between its answer
and "Other Answers".
"""

import ast
import dataclasses
import re
import string
from collections.abc import Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import parquet
from internvlx_jax.evaluation.cells import MISSING
from internvlx_jax.evaluation.cot import reasoned
from internvlx_jax.evaluation.image_policies import (
    FIRST_ONLY,
    MMMU_GRID,
    VLMEVALKIT,
    VLMEVALKIT_MMMU,
)
from internvlx_jax.evaluation.metrics import options
from internvlx_jax.evaluation.prompts import BASE, LETTER, option_lines, vlm_choice
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import (
    Answered,
    Context,
    Result,
    hits,
    inferred_options,
    mean,
)
from internvlx_jax.evaluation.sources import Roots, Source, read_json, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
LETTERS = frozenset(string.ascii_uppercase)
SUBJECTS = [subject for domain in DOMAINS.values() for subject in domain]
IMAGES = [f"image_{i}" for i in range(1, 8)]
# {id: {question_type, ground_truth}}; without it the answers of the parquet files count.
KEY = "MMMU/answer_dict_val.json"

_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = set(":,.!?;'")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


def _files(roots: Roots) -> list[Path]:
    files = []
    for subject in sorted(SUBJECTS):
        found = sorted((roots.data / "MMMU" / subject).glob("validation*.parquet"))
        files += found or [roots.data / "MMMU" / subject / "validation-00000-of-00001.parquet"]
    return files


def _read(roots: Roots) -> list[Question]:
    key = read_json(roots.data / KEY) if (roots.data / KEY).is_file() else {}
    questions = []
    for file in _files(roots):
        for where, row in parquet.rows(file):
            try:
                texts = ast.literal_eval(row["options"])
                entry = key.get(
                    row["id"],
                    {"question_type": row["question_type"], "ground_truth": row["answer"]},
                )
                images = tuple(
                    parquet.image(where, name, row[name]) for name in IMAGES if row.get(name)
                )
                text, id, truth = row["question"].strip(), row["id"], entry["ground_truth"]
            except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
                raise ConfigError(
                    f"{where}: not a question of MMMU ({type(error).__name__}: {error}); download "
                    "the file again"
                ) from None
            questions.append(
                Question(
                    where,
                    id,
                    images,
                    text,
                    tuple(map(str, truth if isinstance(truth, list) else [truth])),
                    options={chr(ord("A") + i): str(text).strip() for i, text in enumerate(texts)},
                    fields={"question_type": entry["question_type"], "subject": file.parent.name},
                )
            )
    return questions


def prompt(question: Question) -> str:
    """Returns the question with its options, if any, and the instruction of its type."""
    choice = question.fields["question_type"] == "multiple-choice"
    return f"{asked(question)}\n{LETTER if choice else BASE}".strip()


def asked(question: Question) -> str:
    """Returns the question with its options, if any, each stripped."""
    options = {letter: text.strip() for letter, text in question.options.items()}
    return f"{question.text.strip()}{option_lines(options)}"


def open_answers(text: str, *, empty_tails: bool = True) -> set[str | float]:
    """Returns the texts and numbers that an answer to an open question states.

    Args:
        text: the answer.
        empty_tails: whether an empty text behind an indicator is the shortest one unless another
            indicator follows, so that the line states nothing (`--compat mmmu_empty_tail`).
    """
    text = text.strip().strip(".").lower()
    parts = text.split("\n")
    stated = []
    for i, part in enumerate(parts):
        # An equation may end the answer: only the last part is cut at "=".
        indicators = _INDICATORS if i < len(parts) - 1 else (*_INDICATORS, "=")
        tails = [
            part.rpartition(indicator)[2].strip() for indicator in indicators if indicator in part
        ]
        shortest = _shortest(tails if empty_tails else [tail for tail in tails if tail])
        if shortest and shortest not in _TRIVIAL:
            stated.append(shortest)
    stated = stated or [text]
    numbers = [
        number for tail in stated for pattern in _NUMBERS for number in pattern.findall(tail)
    ]
    return {form for item in (*stated, *numbers) for form in _normalize(item)}


def _shortest(tails: Sequence[str]) -> str:
    """Returns the shortest tail as the reference finds it: an empty one is replaced by the next."""
    shortest = ""
    for tail in tails:
        if not shortest or len(tail) < len(shortest):
            shortest = tail
    return shortest


def open_matches(text: str, keys: Sequence[str], *, empty_tails: bool = True) -> bool:
    """Whether a key's text is in a stated text, or a key's number is among the stated numbers."""
    wanted = {form for key in keys for form in _normalize(key)}
    return any(
        any(isinstance(key, str) and key in form for key in wanted)
        if isinstance(form, str)
        else form in wanted
        for form in open_answers(text, empty_tails=empty_tails)
    )


def _normalize(text: str) -> list[str | float]:
    """Returns a number rounded to two decimals, or the lower-case text."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        # One letter alone would be found inside any word.
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores choices by their letter and open questions by what the text states."""
    empty_tails = "mmmu_empty_tail" in context.compat
    predictions, right = [], []
    for row in rows:
        question = row.question
        if question.fields["question_type"] == "multiple-choice":
            predictions.append(options.first_option(row.text, question.options))
            right.append(predictions[-1] in question.answers)
        else:
            predictions.append(row.text)
            right.append(open_matches(row.text, question.answers, empty_tails=empty_tails))
    return by_domain(hits(rows, right, predictions, group="subject"))


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores inferred options of the validation split; an open question becomes a choice.

    The options of an open question are its answer and `Other Answers`. Rows of the development
    split are in the file that VLMEvalKit scores; here they get no score of their own.
    """
    letter_key = "mmmu_letter_key" in context.compat
    pandas = "pandas_cells" in context.compat
    closed = [_closed(row, letter_key, pandas) for row in rows]
    letters, notes = inferred_options(closed, context)
    right = [
        letter in row.question.answers and not row.error
        for letter, row in zip(letters, closed, strict=True)
    ]
    counted = [i for i, row in enumerate(rows) if row.question.fields.get("split") != "dev"]
    if not counted:
        notes = [*notes, "only questions of the development split, which have no score"]
        return Result(None, [None] * len(rows), letters, {}, notes)
    chosen = [rows[i] for i in counted]
    result = by_domain(hits(chosen, [right[i] for i in counted], group="category", notes=notes))
    scores: list[float | None] = [None] * len(rows)
    for i in counted:
        scores[i] = float(right[i])
    return dataclasses.replace(result, scores=scores, predictions=letters)


def _closed(row: Answered, letter_key: bool, pandas: bool) -> Answered:
    """Returns a question without option A as a choice between its answer and others.

    Args:
        row: the answered question; a choice keeps its options.
        letter_key: keep a key that is one capital letter, whatever the options, and take A for any
            other key.
        pandas: whether `pandas_cells` is in force.
    """
    question = row.question
    (answer,) = question.answers[:1] or ("",)
    listed = dict(question.options)
    if "A" not in listed:
        # An answer that pandas reads as missing is no option.
        missing = pandas and question.fields.get("answer") in MISSING
        first = {} if missing else {"A": answer}
        listed = {**first, **listed, "B": "Other Answers"}
        if not letter_key:
            answer = "A"
    if letter_key and answer not in LETTERS:
        answer = "A"
    question = dataclasses.replace(question, options=listed, answers=(answer,))
    return dataclasses.replace(row, question=question)


def by_domain(result: Result) -> Result:
    """Adds scores of domains: the mean of their subjects, each of which has 30 questions."""
    spelled = {subject.replace(" ", "_"): score for subject, score in result.parts.items()}
    domains = {
        domain: mean([spelled[subject] for subject in subjects if subject in spelled])
        for domain, subjects in DOMAINS.items()
        if any(subject in spelled for subject in subjects)
    }
    return dataclasses.replace(result, parts={"subjects": result.parts, "domains": domains})


TASKS = (
    Task(
        name="mmmu_val",
        title="MMMU, validation",
        samples=900,
        protocols={
            "internvl": internvl(
                Source(_files, _read),
                prompt,
                score,
                max_new_tokens=10,
                compat=("mmmu_empty_tail", "rgb_after_tiling"),
                images=lambda dynamic: MMMU_GRID if dynamic else FIRST_ONLY,
                cot=reasoned(asked),
            ),
            "vlmevalkit": vlmevalkit(
                tsv("MMMU_DEV_VAL", needs=("answer", "A", "B", "category", "split")),
                vlm_choice,
                score_vlm,
                dataset="MMMU_DEV_VAL",
                compat=("mmmu_letter_key",),
                images=lambda dynamic: VLMEVALKIT_MMMU if dynamic else VLMEVALKIT,
                samples=1050,
                baseline_tiles=12,
            ),
        },
    ),
)
