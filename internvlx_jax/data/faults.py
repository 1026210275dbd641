"""Bad samples: what replaces them, how they are counted, when a run stops (design: data.md 15)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.data_config import FaultConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.line_log import LineLog, read_text_lines
from internvlx_jax.core.paths import as_path

JUDGED_FROM = 100  # a smaller dataset, or fewer samples read, is judged as if it were so many
TRIES = 3  # replacements that are tried before a place stays empty


class Fault(NamedTuple):
    """What is wrong with a sample.

    Attributes:
        dataset: name of its dataset.
        line: number of its record, from 1.
        reason: one of REASONS, or what an image is that is used all the same.
        error: why the sample is bad; None where it is used all the same.
    """

    dataset: str
    line: int
    reason: str
    error: SampleError | None


def replacements(
    generator: np.random.Generator, same_dataset: np.ndarray, bucket: np.ndarray
) -> list[int]:
    """Draws samples to try for a bad one: first of its dataset, then any of its bucket.

    Args:
        generator: seeded by the place in the plan, so that every restart draws the same.
        same_dataset: int64[n], other samples of its dataset that fit.
        bucket: int64[m], all other samples that fit.
    """
    tries = [same_dataset] * (TRIES - 1) + [bucket]
    return [
        int(generator.choice(pool if len(pool) else bucket))
        for pool in tries
        if len(pool) or len(bucket)
    ]


class FaultCounts:
    """Counts the faults of a run on one process, by dataset and reason.

    Each bad sample is written once to a quarantine file. The counts of several processes are added
    before they are judged.

    Args:
        datasets: names in order.
        config: when a run stops.

    Attributes:
        reasons: number of faults by (dataset, reason).
    """

    def __init__(self, datasets: Sequence[str], config: FaultConfig):
        self.datasets, self.config = list(datasets), config
        self.reasons: Counter[tuple[str, str]] = Counter()
        self._read: Counter[str] = Counter()
        self._bad: Counter[str] = Counter()
        self._quarantine: Path | None = None
        self._listed: set[tuple[str, int]] = set()
        self._unwritten: list[Fault] = []

    def list_in(self, quarantine: Path) -> None:
        """Starts logging bad samples to `quarantine`, including those seen so far.

        Each sample is listed once, also over restarts.
        """
        self._quarantine = quarantine
        listed = read_quarantine([quarantine]) if quarantine.exists() else set()
        self._listed |= listed
        self._unwritten = [
            fault for fault in self._unwritten if (fault.dataset, fault.line) not in listed
        ]
        self._write()

    def _write(self) -> None:
        if not self._unwritten or self._quarantine is None:
            return
        lines = [
            json.dumps(
                {
                    "dataset": fault.dataset,
                    "line": fault.line,
                    "reason": fault.reason,
                    "error": str(fault.error),
                },
                ensure_ascii=False,
            )
            + "\n"
            for fault in self._unwritten
        ]
        log = LineLog(self._quarantine)
        log.append(lines)
        log.close()
        self._unwritten.clear()

    def add(self, read: Mapping[str, int], faults: Sequence[Fault]) -> None:
        """Counts samples that were read, and what was wrong with some of them.

        Args:
            read: number of samples by dataset, bad ones included.
            faults: what was wrong.

        Raises:
            SampleError: the first one, when `on_bad` is `fail`.
        """
        self._read.update(read)
        bad = [fault for fault in faults if fault.error is not None]
        self.reasons.update((fault.dataset, fault.reason) for fault in faults)
        self._bad.update(fault.dataset for fault in bad)
        for fault in bad:
            if (fault.dataset, fault.line) not in self._listed:
                self._listed.add((fault.dataset, fault.line))
                self._unwritten.append(fault)
        self._write()
        if self.config.on_bad == "fail":
            for fault in bad:
                if fault.error is not None:
                    raise fault.error

    def totals(self) -> np.ndarray:
        """Returns int64[datasets, 2]: samples read and bad ones."""
        return np.array([(self._read[name], self._bad[name]) for name in self.datasets], np.int64)

    def judge(self, totals: np.ndarray) -> None:
        """Stops the run when too large a share of a dataset is bad.

        Args:
            totals: int64[datasets, 2], those of this process or of all processes together.

        Raises:
            ConfigError: names the dataset, the reasons and the quarantine file.
        """
        for name, (read, bad) in zip(self.datasets, totals.tolist(), strict=True):
            if bad > self.config.max_share * max(read, JUDGED_FROM):
                listed = f", see {self._quarantine}" if self._quarantine else ""
                raise ConfigError(
                    f'dataset "{name}": {bad} of {read} samples are bad, more than '
                    f"data.faults.max_share = {self.config.max_share} "
                    f"({', '.join(self._found(name))}). Correct them{listed}, or raise the limit."
                )

    def _found(self, name: str) -> list[str]:
        """Returns "reason count" of the faults of a dataset."""
        found = sorted(self.reasons.items())
        return [f"{reason} {count}" for (dataset, reason), count in found if dataset == name]

    def summary(self) -> str:
        """Returns "receipts: json 2, unreadable 1; ...", empty without faults."""
        by_dataset = {name: self._found(name) for name in self.datasets}
        return "; ".join(
            f"{name}: {', '.join(found)}" for name, found in by_dataset.items() if found
        )


def read_quarantine(paths: Collection[str | Path]) -> set[tuple[str, int]]:
    """Returns (dataset, line) of the samples that quarantine files list.

    Raises:
        ConfigError: a file does not exist, or a line of it names no sample.
    """
    listed = set()
    for path in paths:
        if not as_path(path).exists():
            raise ConfigError(f"data.faults.exclude: {path} does not exist")
        lines = read_text_lines(as_path(path))
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                break  # the run that wrote it was killed
            try:
                fields = json.loads(line)
                listed.add((fields["dataset"], fields["line"]))
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f'{path} line {number}: no quarantined sample; it needs "dataset" and "line"'
                ) from None
    return listed
