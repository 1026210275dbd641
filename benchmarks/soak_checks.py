"""What soak.py expects, and its report."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "training"))

from kill_run import SAME, content, logged  # noqa: E402

if TYPE_CHECKING:
    from soak import Soak, Start

KILLED, ABORTED, TERMINATED, REFUSED, PREEMPTED, INTERRUPTED = -9, -6, -15, 1, 75, 130
# While it starts, a signal ends a process in the way of the system, and its peers notice.
STARTING = {TERMINATED, INTERRUPTED, PREEMPTED, REFUSED, ABORTED}
WARM_UP_SHARE = 0.1  # of the time in which a start trains, before its memory is looked at
GROWTH_MB, GROWTH_SHARE = 16.0, 0.05  # of memory, that is noise


def unexpected(kind: str, moment: str, codes: Sequence[int]) -> str:
    """Returns what is wrong with the exit statuses of a start; empty if nothing is."""
    expected = {
        "kill": {KILLED},
        "second": {KILLED},
        "full": {REFUSED, ABORTED},
    }.get(kind, {PREEMPTED})
    if moment == "start" and kind in ("terminate", "interrupt", "images"):
        expected = STARTING
    return "" if set(codes) <= expected else f"exit status {list(codes)}, expected {expected}"


def line(start: Start) -> str:
    """Returns a start in one line."""
    layout = f"{start.layout[0]} x {start.layout[1]}"
    peak = max((each.rss for each in start.readings), default=0.0)
    text = (
        f"{start.number:3d} {start.kind:9s} {start.moment:5s} {layout}, {start.workers} workers, "
        f"complete {start.first} -> {start.last}, logged {start.logged}, exit {start.codes}, "
        f"{peak:.0f} MB"
    )
    return text + (f"  SURPRISE: {start.surprise}" if start.surprise else "")


def report(
    soak: Soak,
    segments: Sequence[tuple[tuple[int, int], int]],
    minutes: float,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Returns everything that was seen, and whether each check held."""
    logs = sorted(soak.logs.iterdir())
    last = segments[-1][1]
    checks = {
        "bits": _differences(soak.straight, soak.run, last),
        "tracebacks": [log.name for log in logs if "Traceback" in log.read_text()],
        "messages": _messages(logs, soak.starts),
        "left over": _left_over(soak),
        "orphans": [line(each) for each in soak.starts if each.orphans],
        "surprises": [line(each) for each in soak.starts if each.surprise],
        "memory": _growth(soak.starts),
    }
    skipped = [] if soak.disk.mounted else ["full: no file system could be mounted"]
    skipped += [] if soak.store else ["slow storage: gcp-storage-emulator is not installed"]
    return {
        "passed": not any(checks.values()),
        "minutes": minutes,
        "seconds": round(seconds),
        "seed": seed,
        "steps": last,
        "starts": len(soak.starts),
        "met": dict(Counter(f"{each.kind} {each.moment}" for each in soak.starts)),
        "layouts": dict(Counter(f"{each.layout[0]} x {each.layout[1]}" for each in soak.starts)),
        "segments": [[f"{processes} x {devices}", step] for (processes, devices), step in segments],
        "steps_computed_twice": sum(each.logged - each.last for each in soak.starts),
        "store": soak.store.counted if soak.store else {},
        "skipped": skipped,
        "memory": _memory(soak.starts),
        "checks": checks,
    }


def _differences(one: Path, other: Path, step: int) -> list[str]:
    """Returns arrays of a checkpoint and lines of training metrics that differ in a bit."""
    arrays = [content(run, step) for run in (one, other)]
    found = [
        f"{item} {path}"
        for item, leaves in arrays[0].items()
        for path, leaf in leaves.items()
        if np.asarray(leaf).tobytes() != np.asarray(arrays[1][item][path]).tobytes()
    ]
    # Each start scores once more where it begins or ends; steps are logged once all the same.
    rows = [
        [tuple(row[name] for name in SAME) for row in logged(run) if "loss" in row]
        for run in (one, other)
    ]
    for each in rows:
        if [row[0] for row in each] != list(range(1, step + 1)):
            found.append(f"steps in metrics.jsonl: {len(each)} lines, expected 1 to {step}")
    return found + [f"metrics of step {a[0]}" for a, b in zip(*rows) if a != b]


def _messages(logs: Sequence[Path], starts: Sequence[Start]) -> list[str]:
    """Returns processes that ended with status 1 and did not say why in one line."""
    found = []
    by_name = {log.name: log for log in logs}
    for start in starts:
        for process, code in enumerate(start.codes):
            log = by_name[f"{start.number:03d}-{start.kind}-{process}.log"]
            told = [each for each in log.read_text().splitlines() if each.startswith("error: ")]
            if (code == REFUSED) != (len(told) == 1):
                found.append(f"{log.name}: exit status {code} and {len(told)} errors")
    return found


def _left_over(soak: Soak) -> list[str]:
    """Returns files that an undisturbed run does not have."""

    def names(run: Path) -> set[str]:
        return {
            path.relative_to(run).as_posix()
            for path in run.rglob("*")
            if path.is_file() and "events.out" not in path.name
        }

    told = {"quarantine-0.jsonl", "quarantine-1.jsonl", "quarantine-2.jsonl", "quarantine-3.jsonl"}
    left = sorted(names(soak.run) - names(soak.straight) - told)
    # The newest checkpoint is that of both; the one before it may be another step.
    steps = {each.name for each in (soak.run / "checkpoints").iterdir()}
    left = [name for name in left if name.split("/")[:2][-1] not in steps]
    left += [f"checkpoints/{name}" for name in sorted(steps) if not name.isdigit()]
    left += [path.name for path in soak.disk.folder.iterdir() if path != soak.run]
    left += sorted(path.name for path in soak.pages.folder.rglob("*.partial*"))
    return left + sorted(path.name for path in soak.scratch.iterdir())


def _memory(starts: Sequence[Start]) -> dict[str, Any]:
    """Returns MB of the longest start as it begins to train and ends, and the peaks of starts."""

    def trained(start: Start) -> float:
        return max((each.seconds for each in start.readings), default=0.0) - start.reached

    longest = max(starts, key=trained)
    begin = longest.reached + WARM_UP_SHARE * trained(longest)
    inside = {}
    for process in range(longest.layout[0]):
        late = [
            (each.seconds, each.rss)
            for each in longest.readings
            if each.process == process and each.seconds > begin
        ]
        if len(late) > 2:
            seconds, rss = np.array(late).T
            slope, level = np.polyfit(seconds, rss, 1)
            inside[process] = [float(level + slope * at) for at in (seconds[0], seconds[-1])]
    peaks: dict[str, list[float]] = {}
    for start in starts:
        if start.last > start.first and start.readings:  # those that came to train
            first = [each.rss for each in start.readings if each.process == 0]
            layout = f"{start.layout[0]} x {start.layout[1]}, {start.workers} workers"
            peaks.setdefault(layout, []).append(max(first, default=0.0))
    return {
        "longest": longest.number,
        "longest_seconds": round(trained(longest)),
        "fitted_MB": {str(each): [round(mb, 1) for mb in ends] for each, ends in inside.items()},
        "peaks_MB": {layout: [round(mb) for mb in found] for layout, found in peaks.items()},
    }


def _growth(starts: Sequence[Start]) -> list[str]:
    """Returns where memory grows: inside the longest start, and from start to start."""
    memory, found = _memory(starts), []
    for process, (begin, end) in memory["fitted_MB"].items():
        if end - begin > max(GROWTH_MB, GROWTH_SHARE * begin):
            found.append(f"process {process} of the longest start: {begin} -> {end} MB")
    for layout, peaks in memory["peaks_MB"].items():
        half = len(peaks) // 2
        if half > 1:
            begin, end = float(np.median(peaks[:half])), float(np.median(peaks[-half:]))
            if end - begin > max(GROWTH_MB, GROWTH_SHARE * begin):
                found.append(f"starts of {layout}: {begin} -> {end} MB")
    return found


def text(report: dict[str, Any]) -> str:
    """Returns the report for a reader."""
    met = ", ".join(f"{name} {count}" for name, count in sorted(report["met"].items()))
    lines = [
        f"soak: {'passed' if report['passed'] else 'FAILED'}, seed {report['seed']}",
        f"{report['seconds']} s of trouble (asked: {report['minutes']} minutes), "
        f"{report['starts']} starts, {report['steps']} steps, "
        f"{report['steps_computed_twice']} of them computed again",
        f"met: {met}",
        f"starts by processes x devices: {report['layouts']}; parts of the run: "
        + ", ".join(f"{layout} to {step}" for layout, step in report["segments"]),
        f"object store: {report['store']}",
        f"memory: {report['memory']}",
    ]
    lines += [f"not tried: {each}" for each in report["skipped"]]
    for name, found in report["checks"].items():
        lines.append(f"{name}: " + ("ok" if not found else f"{len(found)} found"))
        lines += [f"    {each}" for each in found[:20]]
    return "\n".join(lines) + "\n"
