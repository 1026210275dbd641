"""MVBench: multiple choice on short videos, in twenty kinds of tasks.

`internvl` reads the JSON files of the benchmark and takes 16 frames, `vlmevalkit` the TSV file
that VLMEvalKit makes of them and 8 frames. Both compare the first word of an answer with the letter
in parentheses; VLMEvalKit then infers the option of the others.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.evaluation.cells import NAN
from internvlx_jax.evaluation.image_policies import FRAMES
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import Answered, Context, Result, hits, inferred_options
from internvlx_jax.evaluation.sources import Roots, Source, tsv_path
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit
from internvlx_jax.evaluation.tsv import list_cell, read_cells
from internvlx_jax.evaluation.video_frames import Segments, find_video, video_frames

ROOT = "MVBench"
COLUMNS = (
    "index",
    "task_type",
    "prefix",
    "data_type",
    "bound",
    "start",
    "end",
    "video",
    "question",
    "answer",
    "candidates",
)
WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail "
    "and movement of objects, and the action and pose of persons. Based on your observations, "
    "select the best option that accurately addresses the question.\n"
)
BEST = "\nOnly give the best option."
_STAR, _CLEVRER, _PERCEPTION = (
    "star/Charades_v1_480",
    "clevrer/video_validation",
    "perception/videos",
)
# Kind of task: folder of its videos, and whether questions are about a part of them.
KINDS = {
    "Action Sequence": (_STAR, True),
    "Action Prediction": (_STAR, True),
    "Action Antonym": ("ssv2_video", False),
    "Fine-grained Action": ("Moments_in_Time_Raw/videos", False),
    "Unexpected Action": ("FunQA_test/test", False),
    "Object Existence": (_CLEVRER, False),
    "Object Interaction": (_STAR, True),
    "Object Shuffle": (_PERCEPTION, False),
    "Moving Direction": (_CLEVRER, False),
    "Action Localization": ("sta/sta_video", True),
    "Scene Transition": ("scene_qa/video", False),
    "Action Count": (_PERCEPTION, False),
    "Moving Count": (_CLEVRER, False),
    "Moving Attribute": (_CLEVRER, False),
    "State Change": (_PERCEPTION, False),
    "Fine-grained Pose": ("nturgbd", False),
    "Character Order": (_PERCEPTION, False),
    "Egocentric Navigation": ("vlnqa", False),
    "Episodic Reasoning": ("tvqa/frames_fps3_hq", True),
    "Counterfactual Inference": (_CLEVRER, False),
}


def _file(kind: str) -> str:
    return f"{kind.lower().replace(' ', '_').replace('-', '_')}.json"


def _asked(question: Question) -> str:
    listed = "".join(f"({letter}) {text}\n" for letter, text in question.options.items())
    return f"Question: {question.text}\nOptions:\n{listed}".rstrip()


def prompt(question: Question) -> str:
    """Returns the frames, the instruction, the question with its options, and the request."""
    count = len(question.images)
    frames = "\n".join(f"Frame{i}: {IMAGE_PLACEHOLDER}" for i in range(1, count + 1))
    return f"{frames}\n{WATCH}\n{_asked(question)}{BEST}"


def prompt_vlm(question: Question) -> str:
    """Returns VLMEvalKit's prompt, whose names of images become names of frames."""
    return named_frames(f"{WATCH}{_asked(question)}{BEST}", len(question.images))


def named_frames(text: str, count: int) -> str:
    """Returns a text behind a list of its frames."""
    frames = "".join(f"Frame-{i}: {IMAGE_PLACEHOLDER}\n" for i in range(1, count + 1))
    if count == 1:  # VLMEvalKit names no single image
        frames = f"{IMAGE_PLACEHOLDER}\n"
    return frames + text


def names_option(answer: str, letter: str, *, empty: bool) -> bool:
    """Whether the first word of an answer and "(letter)" contain one another.

    Args:
        answer: what the model wrote.
        letter: the right option.
        empty: whether a word without letters, which every text contains, counts as right
            (`--compat mvbench_empty_right`).
    """
    word = answer.lower().split(" ")[0]
    key = f"({letter.lower()})"
    if not empty and not any(map(str.isalnum, word)):
        return False
    return word.replace(".", "") in key or key in word


def score(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the first word of each answer, in total and per kind of task."""
    empty = "mvbench_empty_right" in context.compat
    right = [
        names_option(row.text.replace("Answer: ", ""), row.question.answers[0], empty=empty)
        for row in rows
    ]
    return hits(rows, right, group="task_type")


def score_vlm(rows: Sequence[Answered], context: Context) -> Result:
    """Scores the first word of each answer, else the option that rules or the judge infer.

    VLMEvalKit gives an answer that pandas reads as missing no score, and counts that as right.
    """
    empty = "mvbench_empty_right" in context.compat
    missing = {NAN} if empty and "pandas_predictions" in context.compat else set()
    right = [
        row.text in missing or names_option(row.text.strip(), row.question.answers[0], empty=empty)
        for row in rows
    ]
    others = [i for i, hit in enumerate(right) if not hit]
    letters, notes = inferred_options([rows[i] for i in others], context)
    for i, letter in zip(others, letters, strict=True):
        right[i] = letter == rows[i].question.answers[0]
    return hits(rows, right, group="task_type", notes=notes)


def _question(where: str, row: Mapping[str, Any], roots: Roots, count: int, jpeg: bool) -> Question:
    """Returns a question; `row` has the columns of the TSV file.

    Raises:
        KeyError, TypeError, ValueError: a field is missing or of a wrong kind.
    """
    options = {chr(ord("A") + i): str(text) for i, text in enumerate(row["candidates"])}
    letter = next(letter for letter, text in reversed(options.items()) if text == row["answer"])
    bounds = (float(row["start"]), float(row["end"])) if row["bound"] else (None, None)
    path = roots.data / ROOT / row["prefix"] / row["video"]
    found = find_video(path)
    images = (
        (str(path),)
        if found is None
        else video_frames(found, Segments(*bounds), count, jpeg=jpeg, where=where)
    )
    return Question(
        where, row["index"], images, str(row["question"]), (letter,), "", options, row["fields"]
    )


def _checked(rows: Iterable[tuple[str, Mapping[str, Any]]], roots: Roots, count: int, jpeg: bool):
    """Returns the questions.

    Raises:
        ConfigError: a row is no question of MVBench.
        FileNotFoundError: videos are missing.
    """
    questions, missing = [], []
    for where, row in rows:
        try:
            question = _question(where, row, roots, roots.frames or count, jpeg)
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            raise ConfigError(
                f"{where}: not a question of MVBench ({type(error).__name__}: {error}); download "
                "the file again"
            ) from None
        path = roots.data / ROOT / row["prefix"] / row["video"]
        if find_video(path) is None:
            missing.append(str(path))
        questions.append(question)
    raise_missing(missing, "MVBench")
    return questions


def raise_missing(paths: Sequence[str], task: str) -> None:
    """Raises FileNotFoundError if there are paths of missing videos."""
    different = list(dict.fromkeys(paths))
    if different:
        listed = "\n".join(f"  {path}" for path in different[:10])
        more = f"\n  and {len(different) - 10} more" if len(different) > 10 else ""
        raise FileNotFoundError(
            f"{len(different)} videos of {task} are missing; a folder of frames may stand in place "
            f"of each.\n{listed}{more}"
        )


def _json_files(roots: Roots) -> list[Path]:
    return [roots.data / ROOT / "json" / _file(kind) for kind in KINDS]


def _read_json(roots: Roots) -> list[Question]:
    rows = []
    for kind, (folder, bound) in KINDS.items():
        path = roots.data / ROOT / "json" / _file(kind)
        try:
            entries = json.loads(path.read_bytes())
        except ValueError as error:
            raise ConfigError(f"{path}: not JSON ({error}); download it again") from None
        for number, entry in enumerate(entries):
            common = {"index": len(rows), "prefix": f"video/{folder}", "bound": bound}
            rows.append(
                (
                    f"{path} entry {number}",
                    dict(entry) | common | {"fields": {"task_type": kind}},
                )
            )
    return _checked(rows, roots, 16, jpeg=False)


def _read_tsv(roots: Roots) -> list[Question]:
    rows = []
    for where, cells in read_cells(tsv_path(roots, ROOT), COLUMNS):
        bound = {"True": True, "False": False}.get(cells["bound"])
        candidates = list_cell(cells["candidates"], where)
        rows.append((where, cells | {"bound": bound, "candidates": candidates, "fields": cells}))
    return _checked(rows, roots, 8, jpeg=True)


TASKS = (
    Task(
        name="mvbench",
        title="MVBench",
        samples=4000,
        protocols={
            "internvl": internvl(
                Source(_json_files, _read_json),
                prompt,
                score,
                max_new_tokens=1000,
                images=lambda dynamic: FRAMES,
                frames=16,
                compat=("mvbench_empty_right",),
            ),
            "vlmevalkit": dataclasses.replace(
                vlmevalkit(
                    Source(lambda roots: [tsv_path(roots, ROOT)], _read_tsv),
                    prompt_vlm,
                    score_vlm,
                    dataset="MVBench_8frame",
                    images=lambda dynamic: FRAMES,
                    frames=8,
                    compat=("mvbench_empty_right",),
                ),
                prompt=prompt_vlm,
            ),
        },
    ),
)
