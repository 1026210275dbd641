"""Compares the scores of evaluation jobs, question by question (design: evaluation.md 12).

`internvlx report eval DIR...` calls it. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.json_text import read_json_file
from internvlx_jax.evaluation.bootstrap import RESAMPLES, Interval, bootstrap_mean
from internvlx_jax.evaluation.records import Row, Summary, read_rows
from internvlx_jax.evaluation.tasks import TASKS

SCALES = (100.0, 1.0, 1000.0)  # from the score of a question to that of a benchmark

logger = logging.getLogger(__name__)

Key = tuple[str, int]  # id of a question, and how many rows before it have the same id


@dataclasses.dataclass(frozen=True)
class Scored:
    """One task of one model, as its files hold it.

    Attributes:
        model: name of the model; unique together with task and protocol.
        folder: folder of its files.
        summary: its summary.json.
        rows: its rows by question, in the order of the data.
    """

    model: str
    folder: Path
    summary: Summary
    rows: Mapping[Key, Row]

    @property
    def cell(self) -> tuple[str, str]:
        """(task, protocol), which decides what it is compared with."""
        return self.summary.task, self.summary.protocol

    @property
    def scale(self) -> float:
        """Factor from the scores of questions to the unit of the headline.

        It is what the headline shows: 100 for points, 1000 for OCRBench, 1 for fractions. Where the
        headline is no mean, fractions become points and other scores stay.
        """
        units = [*(self.units() or {}).values()]
        if not units:
            return 1.0
        mean, score = sum(units) / len(units), self.summary.score
        for factor in SCALES:
            if mean and score is not None and math.isclose(factor * mean, score, rel_tol=1e-6):
                return factor
        fractions = all(0 <= value <= 1 for value in units)
        return 100.0 if fractions and self.summary.protocol != "generic" else 1.0

    @property
    def judge(self) -> str | None:
        """The model that judged, or None."""
        judge = self.summary.judge
        return judge if judge is None or isinstance(judge, str) else str(judge.get("model"))

    def units(self) -> dict[Key, float] | None:
        """Maps each question that has a score to it; None where the task has no score.

        Rows that ask one question several times, such as the rotations of MMBench, are one
        question: resampling them one by one would make the interval too narrow.
        """
        if self.summary.score is None or self.judge == "pending":
            return None
        scores = {key: row.score for key, row in self.rows.items() if row.score is not None}
        task = TASKS.get(self.summary.task)
        if task is None or task.same_question is None:
            return scores
        units: dict[Key, float] = {}
        for key, score in scores.items():
            question = (str(task.same_question(self.rows[key].question_id)), 0)
            units[question] = min(units.get(question, math.inf), score)
        return units


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One task of a model minus that of the baseline, over the questions that both answered.

    Attributes:
        baseline: the model that it is compared with.
        interval: difference of the mean scores.
        questions: number of common questions.
        better, worse: questions with a higher and a lower score than the baseline's.
    """

    baseline: str
    interval: Interval
    questions: int
    better: int
    worse: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A cell of the table.

    Attributes:
        scored: the task of the model.
        interval: mean score of the questions with its interval; None without scores.
        difference: None for the baseline, and where nothing can be compared.
        notes: what a reader has to know.
    """

    scored: Scored
    interval: Interval | None
    difference: Difference | None
    notes: tuple[str, ...]

    @property
    def is_headline(self) -> bool:
        """Whether the mean score is the headline, so that the interval is that of the headline."""
        score = self.scored.summary.score
        return (
            self.interval is not None
            and score is not None
            and math.isclose(self.interval.mean, score, rel_tol=1e-6, abs_tol=1e-6)
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Disagreement:
    """A question that a model and the baseline answer with different success.

    Attributes:
        model, baseline: the two.
        ours, theirs: their rows.
        gap: score of the model minus that of the baseline, per row.
    """

    model: Scored
    baseline: Scored
    ours: Row
    theirs: Row
    gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """All models and tasks.

    Attributes:
        models: names of the models, the baseline first.
        cells: (task, protocol) of the lines of the table, in order.
        entries: the cells that have a result, by (task, protocol) and model.
        resamples: resamples of each interval.
        seed: seed of the resamples.
    """

    models: tuple[str, ...]
    cells: tuple[tuple[str, str], ...]
    entries: Mapping[tuple[tuple[str, str], str], Entry]
    resamples: int
    seed: int

    def disagreements(self, count: int) -> list[Disagreement]:
        """Returns at most `count` disagreements of each task and model, the largest first.

        Losses of the model stand before gains of the same size, and the order of the data decides
        between equal ones.
        """
        found = []
        for cell in self.cells:
            first = self.entries.get((cell, self.models[0]))
            for model in self.models[1:]:
                entry = self.entries.get((cell, model))
                if first is None or entry is None or entry.difference is None:
                    continue
                pairs = [
                    Disagreement(
                        model=entry.scored,
                        baseline=first.scored,
                        ours=ours,
                        theirs=theirs,
                        gap=ours.score - theirs.score,
                    )
                    for ours, theirs in (
                        (entry.scored.rows[key], first.scored.rows[key])
                        for key in _common(entry.scored, first.scored)
                    )
                    if ours.score is not None and theirs.score is not None
                ]
                pairs = [pair for pair in pairs if pair.gap]
                found += sorted(pairs, key=lambda pair: (-abs(pair.gap), pair.gap))[:count]
        return found


def compare(
    folders: Sequence[Path],
    *,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares all finished tasks below the folders.

    Args:
        folders: folders of `internvlx eval` (OUT_DIR, OUT_DIR/MODEL or a task) or of evaluations
            during training.
        baseline: the model that the others are compared with; the first one by default.
        resamples: resamples of each interval.
        seed: seed of the resamples.

    Raises:
        FileNotFoundError: a folder does not exist or holds no finished task.
        ConfigError: a file cannot be used, or no model has the name of the baseline.
    """
    found = _named([scored for folder in folders for scored in _read(folder)])
    models = list(dict.fromkeys(scored.model for scored in found))
    if baseline is not None and baseline not in models:
        raise ConfigError(
            f'no model is called "{baseline}".{did_you_mean(baseline, models)} '
            f"The folders hold {', '.join(models)}."
        )
    first = baseline or models[0]
    models = [first, *(model for model in models if model != first)]
    order = {name: number for number, name in enumerate(TASKS)}  # question files come last
    cells = sorted(
        dict.fromkeys(scored.cell for scored in found),
        key=lambda cell: order.get(cell[0], len(order)),
    )
    by_place = {(scored.cell, scored.model): scored for scored in found}
    entries = {
        place: _entry(scored, by_place.get((scored.cell, first)), resamples, seed)
        for place, scored in by_place.items()
    }
    return Comparison(
        models=tuple(models), cells=tuple(cells), entries=entries, resamples=resamples, seed=seed
    )


def _read(folder: Path) -> Iterator[Scored]:
    """Yields the finished tasks below a folder, by path."""
    summaries = sorted(folder.rglob("summary.json"))
    for parts in sorted(folder.rglob("parts")):
        if any(parts.glob("*.jsonl")):
            logger.warning("%s is not finished and is left out; --resume goes on", parts.parent)
    if not summaries:
        problem = "holds no summary.json" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"{folder} {problem}; give the --out_dir of a finished internvlx eval"
        )
    for path in summaries:
        stored = read_json_file(path, remedy="run --rescore again")
        summary = Summary.from_json(stored, str(path))
        rows: dict[Key, Row] = {}
        seen: Counter[str] = Counter()
        for row in read_rows(path.parent / "predictions.jsonl"):
            rows[str(row.question_id), seen[str(row.question_id)]] = row
            seen[str(row.question_id)] += 1
        yield Scored(summary.model, path.parent, summary, rows)


def _named(found: Sequence[Scored]) -> list[Scored]:
    """Gives models of one name and several folders names that tell them apart.

    Raises:
        ConfigError: a task was given twice.
    """
    folders: dict[str, set[Path]] = defaultdict(set)
    for scored in found:
        folders[scored.model].add(_owner(scored))
    named = [
        dataclasses.replace(scored, model=f"{scored.model} ({_owner(scored)})")
        if len(folders[scored.model]) > 1
        else scored
        for scored in found
    ]
    seen: dict[tuple[tuple[str, str], str], Scored] = {}
    for scored in named:
        other = seen.setdefault((scored.cell, scored.model), scored)
        if other is not scored and other.folder.resolve() != scored.folder.resolve():
            raise ConfigError(
                f"{other.folder} and {scored.folder} hold the same task of {scored.model}; give "
                "one of them"
            )
    return list(seen.values())


def _owner(scored: Scored) -> Path:
    """Returns the folder of all tasks of a model; a question file has no folder of its own."""
    return scored.folder if scored.summary.protocol == "generic" else scored.folder.parent


def _entry(scored: Scored, first: Scored | None, resamples: int, seed: int) -> Entry:
    units = scored.units()
    notes = []
    if units is None:
        notes.append("waits for a judge" if scored.judge == "pending" else "scored by a server")
    interval = (
        bootstrap_mean([*units.values()], resamples=resamples, seed=seed).scaled(scored.scale)
        if units
        else None
    )
    difference = None
    if units is not None and first is not None and first is not scored:
        difference, more = _difference(scored, first, resamples, seed)
        notes += more
    entry = Entry(scored=scored, interval=interval, difference=difference, notes=())
    if interval is not None and not entry.is_headline:
        notes.append("the interval is that of the mean score of a question, not of the score")
    if scored.summary.errors:
        notes.append(f"{scored.summary.errors} questions failed and count as wrong")
    return dataclasses.replace(entry, notes=tuple(notes))


def _difference(
    scored: Scored, first: Scored, resamples: int, seed: int
) -> tuple[Difference | None, list[str]]:
    """Compares the common questions; scores of different judges are not comparable."""
    ours, theirs = scored.units(), first.units()
    if ours is None or theirs is None:
        return None, ["no difference: the baseline has no scores"]
    if scored.judge != first.judge:
        return None, [f"no difference: judged by {scored.judge}, the baseline by {first.judge}"]
    if changed := _changed(scored, first):
        return None, [f"no difference: question {changed} has other references than the baseline's"]
    common = [key for key in ours if key in theirs]
    if not common:
        return None, ["no difference: no question in common with the baseline"]
    gaps = [ours[key] - theirs[key] for key in common]
    notes = []
    if len(common) < max(len(ours), len(theirs)):
        notes.append(
            f"difference over {len(common)} common questions of {len(ours)}, and {len(theirs)} of "
            "the baseline"
        )
    interval = bootstrap_mean(gaps, resamples=resamples, seed=seed).scaled(scored.scale)
    return Difference(
        baseline=first.model,
        interval=interval,
        questions=len(common),
        better=sum(gap > 0 for gap in gaps),
        worse=sum(gap < 0 for gap in gaps),
    ), notes


def _common(a: Scored, b: Scored) -> list[Key]:
    return [key for key in a.rows if key in b.rows]


def _changed(a: Scored, b: Scored) -> str | None:
    """Returns the id of a common question whose references differ, or None."""
    return next((k[0] for k in _common(a, b) if a.rows[k].answer != b.rows[k].answer), None)
