"""MMMU-Pro: MMMU with ten options, and with the whole question inside the image.

`internvl` reads the parquet files of the hub and the letter that an answer states last. Where an
answer states none, the script of InternVL draws a letter; here it counts as wrong. `vlmevalkit`
reads TSV files and infers the option; it uses the prompts of VLMEvalKit's dataset, because those
of its InternVL class leave out the options. MMMU-Pro is the mean of both settings.
"""

import ast
import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.evaluation import parquet
from internvlx_jax.evaluation.cot import Cot
from internvlx_jax.evaluation.image_policies import VLMEVALKIT, VLMEVALKIT_MMMU
from internvlx_jax.evaluation.prompts import option_lines
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, hits
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks import mmmu
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

SAMPLES = 1730
NEW_TOKENS = 4096
STANDARD, VISION = "standard (10 options)", "vision"
_LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without "
    "quotes) where LETTER is one of {options}."
)
DIRECT = {
    STANDARD: "Answer with the option letter from the given choices directly.",
    VISION: "Answer with the option letter from the given choices directly. "
    + _LAST_LINE.format(options="options"),
}
REASONED = {
    STANDARD: "Answer the preceding multiple choice question. "
    + _LAST_LINE.format(options="options")
    + " Think step by step before answering.",
    VISION: "Write out the multiple-choice question in the image and then solve it. "
    + _LAST_LINE.format(options="options")
    + " Think step by step before answering.",
}
VLM_DIRECT = "Answer directly with the option letter from the given choices. "
VLM_REASONED = _LAST_LINE.format(options="the options") + " Think step by step before answering. "
_NUMBERED = re.compile(r"<image ([1-9])>")


def stated_letter(answer: str, options: Mapping[str, str]) -> str:
    """Reads an answer as the script of MMMU-Pro does.

    Returns:
        The only letter behind the last "Answer:"; else the last of the letters in parentheses,
        alone, or in front of a full stop; for more than five words the option whose text stands
        last. "" where the script draws a letter.
    """
    _, marker, tail = answer.rpartition("Answer:")
    behind = [letter for letter in options if letter in tail.strip()]
    if marker and len(behind) == 1:
        return behind[0]
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if form.format(letter) in answer]
        if len(found) == 1:
            return found[0]
        if found:
            return max(found, key=lambda letter: answer.rfind(place.format(letter)))
    if len(answer.split()) <= 5:
        return ""
    lower = answer.lower()
    named = [letter for letter, text in options.items() if text.lower() in lower]
    return max(named, key=lambda letter: lower.rfind(options[letter].lower()), default="")


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the letters that answers state, in total and per subject and domain."""
    letters = [stated_letter(row.text, row.question.options) for row in rows]
    right = [letter in row.question.answers for letter, row in zip(letters, rows, strict=True)]
    return mmmu.by_domain(hits(rows, right, letters, group="subject"))


# --- internvl -------------------------------------------------------------------------------------


def _parquet(setting: str) -> Source:
    folder = f"MMMU_Pro/{setting}"

    def files(roots: Roots) -> list[Path]:
        found = sorted((roots.data / folder).glob("test*.parquet"))
        return found or [roots.data / folder / "test-00000-of-00001.parquet"]

    def read(roots: Roots) -> list[Question]:
        return [
            _question(where, row, setting)
            for file in files(roots)
            for where, row in parquet.rows(file)
        ]

    return Source(files, read)


def _question(where: str, row: Mapping, setting: str) -> Question:
    try:
        names = ["image"] if setting == VISION else _present(row)
        images = tuple(parquet.image(where, name, row[name]) for name in names)
        texts = ast.literal_eval(str(row["options"]))
        options = {chr(ord("A") + i): str(text) for i, text in enumerate(texts)}
        fields = {"subject": row["subject"]}
        text = "" if setting == VISION else row["question"]
        question = Question(where, row["id"], images, text, (row["answer"],), "", options, fields)
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        raise ConfigError(
            f"{where}: not a question of MMMU-Pro, {setting} ({type(error).__name__}: {error})"
        ) from None
    return question if setting == VISION else _in_order(question, _standard(question))


def _present(row: Mapping) -> list[str]:
    """Returns the columns of images up to the first empty one."""
    names = [f"image_{i}" for i in range(1, 8)]
    count = next((i for i, name in enumerate(names) if not row[name]), len(names))
    return names[:count]


def _standard(question: Question) -> str:
    return f"{question.text}{option_lines(question.options)}"


def _in_order(question: Question, text: str) -> Question:
    """Orders the images as the text names them; images that it does not name stand in front."""
    named = [int(number) - 1 for number in _NUMBERED.findall(text)]
    if any(number >= len(question.images) for number in named):
        raise ConfigError(
            f"{question.where}: it names image {max(named) + 1} but has {len(question.images)}; "
            "download the file again"
        )
    images = question.images
    others = [image for i, image in enumerate(images) if i not in named]
    ordered = (*others, *(images[i] for i in named))
    return dataclasses.replace(
        question, images=ordered, fields=dict(question.fields) | {"in_front": len(others)}
    )


def _prompt(setting: str, instructions: Mapping[str, str]):
    def prompt(question: Question) -> str:
        if setting == VISION:
            return instructions[setting]
        front = f"{IMAGE_PLACEHOLDER}\n" * question.fields["in_front"]
        text = _NUMBERED.sub(IMAGE_PLACEHOLDER, _standard(question))
        return f"{front}{text}\n{instructions[setting]}"

    return prompt


# --- vlmevalkit -----------------------------------------------------------------------------------


def _vlm_text(question: Question, instruction: str) -> str:
    listed = "".join(f"{letter}. {text}\n" for letter, text in question.options.items())
    asked = f"Options:\n{listed}{instruction}" if question.options else ""
    return f"Question: {question.text}\n{asked}"


def _vlm_prompt(instruction: str):
    """Returns VLMEvalKit's prompt, which names the images where they belong."""

    def prompt(question: Question) -> str:
        text = _vlm_text(question, instruction)
        parts = _NUMBERED.split(text)
        count = len(question.images)
        if count == 1:  # the template puts the image in front
            return "\n".join(parts[::2])
        numbers = iter(range(1, count + 1))
        text = _NUMBERED.sub(lambda _: f"<Image-{next(numbers)}>", text)
        together = "".join(f"<Image-{i}>" for i in range(1, count + 1))
        listed = "".join(f"Image-{i}: {IMAGE_PLACEHOLDER}\n" for i in range(1, count + 1))
        return listed + text.replace(together, "")

    return prompt


def _vlm_order(question: Question) -> Question:
    """Repeats and orders the images as the question and its options name them."""
    named = [int(number) - 1 for number in _NUMBERED.findall(_vlm_text(question, ""))]
    if not named:
        return question
    if max(named) >= len(question.images):
        raise ConfigError(
            f"{question.where}: it names image {max(named) + 1} but has {len(question.images)}; "
            "download the file again"
        )
    return dataclasses.replace(question, images=tuple(question.images[i] for i in named))


def _vision_prompt(instruction: str):
    return lambda question: (
        f"Answer the following multiple-choice question in the image. {instruction}"
    )


def last_line(text: str) -> str:
    """Returns what VLMEvalKit reads from an answer with reasoning.

    This is the only capital letter behind the last line that begins with "Answer:", or all of the
    text behind it; without such a line it is the whole answer.
    """
    lines = [line.strip() for line in text.strip().split("\n")]
    found = [line.removeprefix("Answer:") for line in lines if line.startswith("Answer:")]
    if not found:
        return text
    letters = set(found[-1]) & set(string.ascii_uppercase)
    return letters.pop() if len(letters) == 1 else found[-1]


def _vlm(setting: str):
    dataset = "MMMU_Pro_V" if setting == VISION else "MMMU_Pro_10c"
    build = _vision_prompt if setting == VISION else _vlm_prompt
    reasoned = VLM_REASONED
    if setting == STANDARD:
        reasoned = f"Answer the following multiple-choice question. {VLM_REASONED}"
    needs = ("answer", "A", "B", "category")
    source = (
        tsv(dataset, needs=needs, question="placeholder")  # as VLMEvalKit, and in its table
        if setting == VISION
        else tsv(dataset, needs=needs, finish=_vlm_order)
    )
    spec = vlmevalkit(
        source,
        build(VLM_DIRECT),
        mmmu.score_vlm,
        dataset=dataset,
        compat=("mmmu_letter_key",),
        images=lambda dynamic: VLMEVALKIT_MMMU if dynamic else VLMEVALKIT,
    )
    cot = Cot(prompt=build(reasoned), read=last_line, dataset=f"{dataset}_COT")
    return dataclasses.replace(spec, prompt=build(VLM_DIRECT), cot=cot)


def _task(setting: str) -> Task:
    name = "vision" if setting == VISION else "standard"
    return Task(
        name=f"mmmu_pro_{name}",
        title=f"MMMU-Pro, {setting}",
        samples=SAMPLES,
        protocols={
            "internvl": internvl(
                _parquet(setting),
                _prompt(setting, DIRECT),
                score,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=0,
                cot=Cot(prompt=_prompt(setting, REASONED), read=str),
            ),
            "vlmevalkit": _vlm(setting),
        },
    )


TASKS = (_task(STANDARD), _task(VISION))
