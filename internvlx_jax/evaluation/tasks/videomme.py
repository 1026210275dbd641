"""Video-MME without subtitles: multiple choice on videos of seconds to an hour.

VLMEvalKit's prompt and metric: the first of the letters A to D in an answer, in total and per
duration and domain. No judge reads the other answers, since the options that it would need do not
stand in the columns where VLMEvalKit looks for them.
"""

import dataclasses
import re
from collections.abc import Sequence

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation.image_policies import FRAMES
from internvlx_jax.evaluation.prompts import LETTER
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, by_group, hits
from internvlx_jax.evaluation.sources import Roots, Source, tsv_path
from internvlx_jax.evaluation.tasks.mvbench import named_frames, raise_missing
from internvlx_jax.evaluation.tasks.task import Task, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell, read_cells
from internvlx_jax.evaluation.video_frames import Steps, find_video, video_frames

NAME = "Video-MME"
FRAME_COUNT = 8
COLUMNS = (
    "index",
    "video",
    "duration",
    "domain",
    "candidates",
    "sub_category",
    "task_type",
    "question",
    "answer",
)
GROUPS = ("duration", "domain", "sub_category", "task_type")
WATCH = (
    "\nThese are the frames of a video. Select the best answer to the following multiple-choice "
    "question based on the video. Respond with only the letter (A, B, C, or D) of the correct "
    "option.\n"
)
# Two commas are missing in the reference, so that four of these texts are only two.
_PREFIXES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",
    "Best answer:Best option:",
    "Answer:",
    "Option:",
)
_MEANT = (
    *_PREFIXES[:4],
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
    *_PREFIXES[6:],
)


def prompt(question: Question) -> str:
    """Returns the frames, the instruction, the question with its options, and the request."""
    listed = "\n".join(question.options.values())
    asked = f"{WATCH}Question: {question.text}\n{listed} \n{LETTER}"
    return named_frames(asked, len(question.images))


def first_letter(answer: str, *, as_written: bool) -> str:
    """Returns the first of the letters A to D behind common openings; "" without one.

    Args:
        answer: what the model wrote.
        as_written: take the openings of the reference, in which "Best option: C" is B
            (`--compat videomme_openings`).
    """
    answer = answer.strip()
    for opening in _PREFIXES if as_written else _MEANT:
        answer = answer.replace(opening, "")
    match = re.search("[ABCD]", answer)
    return match[0] if match else ""


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the first letter of each answer."""
    as_written = "videomme_openings" in context.compat
    letters = [first_letter(row.text, as_written=as_written) for row in rows]
    right = [letter in row.question.answers for letter, row in zip(letters, rows, strict=True)]
    result = hits(rows, right, letters)
    known = [value or 0.0 for value in result.scores]
    parts = {
        group: by_group([row.question.fields[group] for row in rows], known) for group in GROUPS
    }
    return dataclasses.replace(result, parts=parts)


def _read(roots: Roots) -> list[Question]:
    questions, missing = [], []
    for where, cells in read_cells(tsv_path(roots, NAME), COLUMNS):
        texts = list_cell(cells["candidates"], where)
        options = {chr(ord("A") + i): text for i, text in enumerate(texts)}
        if cells["answer"] not in options:
            raise ConfigError(
                f"{where}: answer {cells['answer']!r} is none of the letters "
                f"{', '.join(options)}; download the file again"
            )
        path = roots.data / NAME / "video" / f"{cells['video']}.mp4"
        found = find_video(path)
        count = roots.frames or FRAME_COUNT
        images = (
            () if found is None else video_frames(found, Steps(), count, jpeg=True, where=where)
        )
        missing += [str(path)] if found is None else []
        answers = (cells["answer"],)
        questions.append(
            Question(where, cells["index"], images, cells["question"], answers, "", options, cells)
        )
    raise_missing(missing, NAME)
    return questions


TASKS = (
    Task(
        name="videomme",
        title="Video-MME, without subtitles",
        samples=2700,
        protocols={
            "vlmevalkit": dataclasses.replace(
                vlmevalkit(
                    Source(lambda roots: [tsv_path(roots, NAME)], _read),
                    prompt,
                    score,
                    dataset=f"{NAME}_{FRAME_COUNT}frame",
                    images=lambda dynamic: FRAMES,
                    frames=FRAME_COUNT,
                    compat=("videomme_openings",),
                ),
                prompt=prompt,
            )
        },
    ),
)
