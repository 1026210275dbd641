"""A comparison as Markdown and CSV (design: evaluation.md 12). Nothing here imports jax."""

from __future__ import annotations

import csv
import io

from internvlx_jax.evaluation.bootstrap import Interval
from internvlx_jax.evaluation.compare import Comparison, Entry

COLUMNS: tuple[str, ...] = (
    "task",
    "protocol",
    "model",
    "score",
    "mean",
    "low",
    "high",
    "questions",
    "errors",
    "judge",
    "baseline",
    "difference",
    "difference_low",
    "difference_high",
    "common",
    "better",
    "worse",
    "notes",
)


def markdown(comparison: Comparison) -> str:
    """Returns the table in Markdown: a line per task, a column per model, and the notes below."""
    notes: list[str] = []
    lines = [["task", "protocol", *comparison.models]]
    lines.append(["---"] * len(lines[0]))
    for cell in comparison.cells:
        line = [*cell]
        for model in comparison.models:
            entry = comparison.entries.get((cell, model))
            line.append("" if entry is None else _cell(entry, notes))
        lines.append(line)
    table = "".join("| " + " | ".join(_escaped(each) for each in line) + " |\n" for line in lines)
    listed = "".join(f"{number}. {note}\n" for number, note in enumerate(notes, start=1))
    return f"{table}\n{legend(comparison)}\n" + (f"\n{listed}" if listed else "")


def legend(comparison: Comparison) -> str:
    """Returns what the numbers of a cell are, in one paragraph."""
    text = (
        f"Scores with 95 % bootstrap intervals ({comparison.resamples} resamples of the questions, "
        f"seed {comparison.seed})."
    )
    if len(comparison.models) > 1:
        text += (
            f" In parentheses the difference to {comparison.models[0]} on the same questions, with "
            "its interval; a star marks an interval without zero."
        )
    return text


def csv_text(comparison: Comparison) -> str:
    """Returns the table as CSV, a line per task and model."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for cell in comparison.cells:
        for model in comparison.models:
            entry = comparison.entries.get((cell, model))
            if entry is not None:
                writer.writerow(_fields(entry))
    return text.getvalue()


def number(value: float | None) -> str:
    """Returns a score as it is shown: four digits for fractions, two for points."""
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) <= 1 else f"{value:.2f}"


def score_text(entry: Entry) -> str:
    """Returns the score of a cell with its interval."""
    score = entry.scored.summary.score
    text = "pending" if entry.scored.judge == "pending" else number(score)
    return text if entry.interval is None else f"{text} {_bounds(entry.interval, score)}"


def difference_text(entry: Entry) -> str:
    """Returns the difference to the baseline with its interval; empty without one."""
    if entry.difference is None:
        return ""
    interval = entry.difference.interval
    star = "" if interval.holds_zero else "*"
    return f"({interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]{star})"


def _bounds(interval: Interval, score: float | None) -> str:
    digits = 4 if score is not None and abs(score) <= 1 and interval.high <= 1 else 2
    return f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _cell(entry: Entry, notes: list[str]) -> str:
    """Returns the text of a cell; adds its notes to `notes` and refers to them by number."""
    text = " ".join(filter(None, (score_text(entry), difference_text(entry))))
    for note in entry.notes:
        if note not in notes:
            notes.append(note)
    references = ",".join(str(notes.index(note) + 1) for note in entry.notes)
    return f"{text} <sup>{references}</sup>" if references else text


def _fields(entry: Entry) -> dict[str, object]:
    summary, interval, difference = entry.scored.summary, entry.interval, entry.difference
    fields: dict[str, object] = {
        "task": summary.task,
        "protocol": summary.protocol,
        "model": entry.scored.model,
        "score": "" if summary.score is None else summary.score,
        "questions": summary.samples,
        "errors": summary.errors,
        "judge": entry.scored.judge or "",
        "notes": "; ".join(entry.notes),
    }
    if interval is not None:
        fields |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
    if difference is not None:
        fields |= {
            "baseline": difference.baseline,
            "difference": difference.interval.mean,
            "difference_low": difference.interval.low,
            "difference_high": difference.interval.high,
            "common": difference.questions,
            "better": difference.better,
            "worse": difference.worse,
        }
    return fields


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
