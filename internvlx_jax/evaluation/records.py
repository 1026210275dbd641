"""The records that an evaluation writes, as JSON in the order of their fields.

(design: evaluation.md 8, 9) A record is written with `to_json` and read with `from_json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.files import written_aside
from internvlx_jax.core.json_text import decode_json, encode_line, read_lines, shown
from internvlx_jax.core.line_log import LineLog, read_whole, segments


class Record:
    """A dataclass whose JSON object has its fields in order."""

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any], where: str) -> Self:
        """Reads a JSON object; fields that the record does not have are left out.

        Raises:
            ConfigError: a field is missing or has another type; the message begins with `where`.
        """
        if not isinstance(stored, Mapping):
            raise ConfigError(f"{where}: {shown(stored)} is no JSON object; run eval.py again")
        names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType] (subclasses are dataclasses)
        if missing := sorted(set(names) - stored.keys()):
            raise ConfigError(f"{where}: no {', '.join(missing)}; run eval.py again")
        hints = get_type_hints(cls)
        for name in names:
            if not _fits(stored[name], hints[name]):
                raise ConfigError(
                    f"{where}: {name} is {shown(stored[name])}, which eval.py does not write; run "
                    "it again"
                )
        return cls(**{name: stored[name] for name in names})


def _fits(value: Any, hint: Any) -> bool:
    """Returns whether a JSON value is one of a field with this type."""
    if hint is Any:
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(_fits(each, inner[0]) for each in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(each, inner[1]) for each in value.values())
    return isinstance(value, hint)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Record):
    """One line of predictions.jsonl.

    Attributes:
        index: number of the question.
        question_id: its id in the data.
        prompt: what the model was asked.
        images: where the images come from.
        tiles: tiles of all images.
        prompt_tokens: length of the prompt, visual tokens included.
        new_tokens: length of the answer.
        finish: why the answer ends: "stop", "length" or "error".
        raw: what the model wrote.
        prediction: what the metric read from it; None before scoring.
        answer: accepted answers.
        score: score of the row; None before scoring, without references, or without a judge.
        error: why there is no answer.
    """

    index: int
    question_id: str | int
    prompt: str
    images: list[str]
    tiles: int
    prompt_tokens: int
    new_tokens: int
    finish: str
    raw: str
    prediction: str | None
    answer: list[str]
    score: float | None
    error: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary(Record):
    """summary.json: the score of a task and everything that decides it.

    Attributes:
        task, title, protocol: the benchmark.
        model: name of the checkpoint.
        score: the headline; None without references, or while a judge is missing.
        parts: sub-scores.
        samples: number of questions.
        errors: questions without an answer, which count as wrong.
        stopped_by_length: answers cut at the maximum of new tokens.
        notes: what a reader has to know about the score.
        judge: the judge and the dates of its replies; "pending" while it is missing; None where
            none was asked.
        compat: deviations in force.
        files: further files in the folder of the task.
        settings: `job.AnswerSettings` as JSON, kept as stored when a summary is read.
        settings_hash: hash of `settings`.
        versions: versions of the libraries.
    """

    task: str
    title: str
    protocol: str
    model: str
    score: float | None
    parts: Mapping[str, Any]
    samples: int
    errors: int
    stopped_by_length: int
    notes: list[str]
    judge: Mapping[str, Any] | str | None
    compat: list[str]
    files: list[str]
    settings: Mapping[str, Any]
    settings_hash: str
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo(Record):
    """run.json: what does not change the result, such as where and how fast it was computed.

    Attributes:
        config: settings of the job.
        seconds: duration of the task.
        processes: number of processes.
        devices: number and kind of the devices.
        rows: rows per batch.
        executables: number of compiled executables so far.
        speed: speeds of the job so far.
    """

    config: Mapping[str, Any]
    seconds: float
    processes: int
    devices: str
    rows: int
    executables: int
    speed: Mapping[str, Any]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes a predictions.jsonl, one row per line."""
    with written_aside(path) as aside, aside.open("wb") as file:
        file.writelines(encode_line(row.to_json()) for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Reads a predictions.jsonl.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is no row; the message names it.
    """
    return [Row.from_json(stored, where) for where, stored in read_objects(path)]


def read_objects(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Reads the lines of a predictions.jsonl as ("FILE line N", JSON object).

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: a line is no JSON object; the message names it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; give the predictions.jsonl of an eval.py run"
        )
    objects = []
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        try:
            stored = decode_json(line)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}; run eval.py again") from None
        if not isinstance(stored, dict):
            raise ConfigError(f"{where}: not a JSON object; run eval.py again")
        objects.append((where, stored))
    return objects


class Parts:
    """The part files of one task; all of their rows belong to one settings hash.

    Attributes:
        folder: folder of the part files.
        settings: the settings hash.
    """

    def __init__(self, folder: Path, settings: str):
        self.folder, self.settings = folder, settings

    def exist(self) -> bool:
        """Whether there is any part file."""
        return any(self.folder.glob("*.jsonl"))

    def read(self) -> dict[int, Row]:
        """Returns all finished rows by index; a line that an interruption cut off does not count.

        Raises:
            ConfigError: rows come from other settings, or two rows of one index differ.
        """
        rows: dict[int, Row] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(read_whole(path).split(b"\n"), start=1):
                try:
                    stored = decode_json(line)
                except ValueError:
                    continue
                where = f"{path} line {number}"
                if not isinstance(stored, dict):
                    raise ConfigError(f"{where}: not a JSON object; remove the line")
                if stored.pop("settings", None) != self.settings:
                    raise ConfigError(
                        f"{where}: answered with other settings (checkpoint, data, prompts, tiles "
                        "or decoding); use them again, another --out_dir, or remove this folder"
                    )
                row = Row.from_json(stored, where)
                if not isinstance(row.index, int):
                    raise ConfigError(f"{where}: index is {shown(row.index)}; remove the line")
                if rows.setdefault(row.index, row) != row:
                    raise ConfigError(
                        f"{where}: index {row.index} has two different answers; remove "
                        f"{self.folder}"
                    )
        return rows

    def log(self, name: str) -> LineLog:
        """Opens NAME.jsonl; rows are appended behind those of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = LineLog(self.folder / f"{name}.jsonl", durable=True)
        log.keep(lambda line: True)  # but for a line that an interruption cut off
        return log

    def line(self, row: Row) -> bytes:
        """Returns the line of a row."""
        return encode_line({"settings": self.settings} | vars(row))

    def remove(self) -> None:
        """Removes the part files and their folder."""
        for path in self.folder.glob("*.jsonl"):
            for segment in segments(path):
                segment.unlink()
            path.unlink(missing_ok=True)
        if self.folder.is_dir():
            self.folder.rmdir()
