"""Bad samples: what takes their place, how many there are, when a run stops (design: data.md 15)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.data_config import FaultConfig
from internvlx_jax.core.errors import ConfigError, SampleError

JUDGED_FROM = 100  # a smaller dataset, or fewer samples read, is judged as if it were so many
TRIES = 3  # replacements that are tried before a slot stays empty


class Fault(NamedTuple):
    """A bad sample. `error` is None where a sample is used although an image is `reason`."""

    dataset: str
    line: int
    reason: str
    error: SampleError | None


def replacements(
    generator: np.random.Generator, same_dataset: np.ndarray, bucket: np.ndarray
) -> list[int]:
    """Samples to try for a bad one: first others of its dataset, then any others of its bucket."""
    tries = [same_dataset] * (TRIES - 1) + [bucket]
    return [
        int(generator.choice(pool if len(pool) else bucket))
        for pool in tries
        if len(pool) or len(bucket)
    ]


class FaultCounts:
    """Faults of a run on one process: counted by dataset and reason, each sample written once to a quarantine file.

    datasets: names in order. The counts of several processes are added before they are judged.
    """

    def __init__(self, datasets: Sequence[str], config: FaultConfig):
        self.datasets, self.config = list(datasets), config
        self.reasons = Counter()
        self._read, self._bad = Counter(), Counter()
        self._quarantine: Path | None = None
        self._listed: set[tuple[str, int]] = set()
        self._unwritten: list[Fault] = []

    def list_in(self, quarantine: Path) -> None:
        """Append the bad samples to this file, those of before and those to come; none that stands there already."""
        self._quarantine = quarantine
        there = read_quarantine([quarantine]) if quarantine.is_file() else set()
        self._listed |= there
        self._unwritten = [
            fault for fault in self._unwritten if (fault.dataset, fault.line) not in there
        ]
        self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        with self._quarantine.open("a", encoding="utf-8") as file:
            for fault in self._unwritten:
                file.write(
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
                )
        self._unwritten.clear()

    def add(self, read: Mapping[str, int], faults: Sequence[Fault]) -> None:
        """Samples read of each dataset, bad ones included, and what was wrong with some of them.

        Raises the first error when `on_bad` is `fail`.
        """
        self._read.update(read)
        bad = [fault for fault in faults if fault.error is not None]
        self.reasons.update((fault.dataset, fault.reason) for fault in faults)
        self._bad.update(fault.dataset for fault in bad)
        for fault in bad:
            if (fault.dataset, fault.line) not in self._listed:
                self._listed.add((fault.dataset, fault.line))
                self._unwritten.append(fault)
        if self._quarantine:
            self._write()
        if self.config.on_bad == "fail":
            for fault in bad:
                raise fault.error

    def totals(self) -> np.ndarray:
        """int64[datasets, 2]: samples read and bad ones."""
        return np.array([(self._read[name], self._bad[name]) for name in self.datasets], np.int64)

    def judge(self, totals: np.ndarray) -> None:
        """Raises ConfigError when too large a share of a dataset is bad; `totals` may be those of all processes."""
        for name, (read, bad) in zip(self.datasets, totals.tolist()):
            if bad > self.config.max_share * max(read, JUDGED_FROM):
                reasons = {
                    reason: count
                    for (dataset, reason), count in self.reasons.items()
                    if dataset == name
                }
                raise ConfigError(
                    f'dataset "{name}": {bad} of {read} samples are bad, more than data.faults.max_share = '
                    f"{self.config.max_share} ({', '.join(f'{r} {n}' for r, n in sorted(reasons.items()))}). Correct "
                    f"them{f', see {self._quarantine}' if self._quarantine else ''}, or raise the limit."
                )

    def summary(self) -> str:
        """'receipts: json 2, unreadable 1; ...', empty without faults."""
        by_dataset = {
            name: [
                f"{reason} {count}"
                for (dataset, reason), count in sorted(self.reasons.items())
                if dataset == name
            ]
            for name in self.datasets
        }
        return "; ".join(
            f"{name}: {', '.join(found)}" for name, found in by_dataset.items() if found
        )


def read_quarantine(paths: Collection[str | Path]) -> set[tuple[str, int]]:
    """(dataset, line) of the samples that quarantine files list. Raises ConfigError naming file and line."""
    listed = set()
    for path in paths:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            raise ConfigError(f"data.faults.exclude: {path} does not exist") from None
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
