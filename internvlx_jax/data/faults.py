"""Bad samples: what replaces them, how they are counted, when a run stops (design: data.md 15)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internvlx_jax.core.data_config import FaultConfig
from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.json_text import complete_lines, decode_json, encode_line
from internvlx_jax.core.line_log import LineLog, holds_lines, read_whole
from internvlx_jax.core.paths import as_path

JUDGED_FROM = 100  # a smaller dataset, or fewer samples read, is judged as if it were so many
TRIES = 3  # replacements that are tried before a place stays empty
EXAMPLES = 3  # bad samples of a dataset that a message names


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


class Origin(NamedTuple):
    """Where the records of a dataset come from, whatever a meta file calls it.

    Attributes:
        annotation: absolute path, URL or name of the records.
        root: absolute path or URL of the folder of its images; empty without one.
    """

    annotation: str
    root: str


class Listed(NamedTuple):
    """A sample in a quarantine file.

    Attributes:
        dataset: name of its dataset.
        origin: where it comes from; None in a file of version 0.1, which had names only.
        line: number of its record, from 1.
    """

    dataset: str
    origin: Origin | None
    line: int

    def is_of(self, dataset: str, origin: Origin | None) -> bool:
        """Returns whether it is of this dataset: the annotation decides where it is known."""
        if self.origin is None or origin is None:
            return self.dataset == dataset
        return self.origin == origin


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
        origins: where each dataset comes from, by name.

    Attributes:
        reasons: number of faults by (dataset, reason).
        bad: the bad samples of each dataset, each once.
    """

    def __init__(
        self,
        datasets: Sequence[str],
        config: FaultConfig,
        origins: Mapping[str, Origin] | None = None,
    ):
        self.datasets, self.config = list(datasets), config
        self.origins = dict(origins or {})
        self.reasons: Counter[tuple[str, str]] = Counter()
        self.bad: dict[str, list[Fault]] = defaultdict(list)
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
        found = read_quarantine([quarantine]) if quarantine.exists() else set()
        listed = {
            (name, sample.line)
            for sample in found
            for name in self.datasets
            if sample.is_of(name, self.origins.get(name))
        }
        self._listed |= listed
        self._unwritten = [
            fault for fault in self._unwritten if (fault.dataset, fault.line) not in listed
        ]
        self._write()

    def _write(self) -> None:
        if not self._unwritten or self._quarantine is None:
            return
        log = LineLog(self._quarantine)
        log.append(encode_line(self._row(fault)) for fault in self._unwritten)
        log.close()
        self._unwritten.clear()

    def _row(self, fault: Fault) -> dict[str, str | int]:
        origin = self.origins.get(fault.dataset)
        return {
            "dataset": fault.dataset,
            "line": fault.line,
            "reason": fault.reason,
            "error": str(fault.error),
        } | (origin._asdict() if origin else {})

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
                self.bad[fault.dataset].append(fault)
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
                listed = f", see {self._quarantine}" if self._quarantine else self.examples(name)
                raise ConfigError(
                    f'dataset "{name}": {bad} of {read} samples are bad, more than '
                    f"data.faults.max_share = {self.config.max_share} "
                    f"({', '.join(self._found(name))}). Correct them{listed}, or raise the limit."
                )

    def _found(self, name: str) -> list[str]:
        """Returns "reason count" of the faults of a dataset."""
        found = sorted(self.reasons.items())
        return [f"{reason} {count}" for (dataset, reason), count in found if dataset == name]

    def examples(self, *names: str) -> str:
        """Returns "; for example PLACE: PROBLEM; ...", empty where nothing is bad."""
        found = [fault for name in names or self.datasets for fault in self.bad[name][:EXAMPLES]]
        told = [str(fault.error).partition("\n")[0].rstrip(".") for fault in found[:EXAMPLES]]
        return "; for example " + "; ".join(told) if told else ""

    def summary(self) -> str:
        """Returns "receipts: json 2, unreadable 1; ...", empty without faults."""
        by_dataset = {name: self._found(name) for name in self.datasets}
        return "; ".join(
            f"{name}: {', '.join(found)}" for name, found in by_dataset.items() if found
        )


def read_quarantine(paths: Collection[str | Path]) -> set[Listed]:
    """Returns the samples that quarantine files list.

    Raises:
        ConfigError: a file does not exist, or a line of it names no sample.
    """
    listed = set()
    for path in paths:
        if not holds_lines(as_path(path)):
            raise ConfigError(f"data.faults.exclude: {path} does not exist")
        data = read_whole(as_path(path))
        # A last line without its end is of a run that was killed.
        for number, line in enumerate(complete_lines(data), start=1):
            try:
                fields = decode_json(line)
                named = "annotation" in fields
                origin = Origin(fields["annotation"], fields.get("root", "")) if named else None
                listed.add(Listed(fields["dataset"], origin, int(fields["line"])))
            except (ValueError, TypeError, KeyError):
                raise ConfigError(
                    f'{path} line {number}: no quarantined sample; it needs "dataset" and "line"'
                ) from None
    return listed
