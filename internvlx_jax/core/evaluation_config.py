"""What is evaluated (design: evaluation.md 1)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.ranges import COUNT, check_ranges

Protocol = Literal["internvl", "vlmevalkit"]
PROTOCOLS: tuple[Protocol, ...] = ("internvl", "vlmevalkit")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Says what is asked.

    Attributes:
        data: A question file.
        metric: How its answers are scored.
        image_root: The folder of its images.
        prompt: How it is asked; `{question}` stands for the text.
        tasks, suite: Benchmarks, by name.
        protocol: In place of the benchmarks' own.
        data_root: Where the data of benchmarks lie.
        tsv_root: Where their TSV files lie; data_root/tsv by default.
        limit: Takes only the first questions of each.
        max_new_tokens: In place of the task's own.
        compat: Comma-separated names of the scorers' deviations, `none` or `acceptance`, in place
            of the protocol's own.
    """

    data: str | None = None
    metric: str | None = None
    image_root: str | None = None
    prompt: str = "{question}"
    tasks: str | None = None
    suite: str | None = None
    protocol: Protocol | None = None
    data_root: str = "data"
    tsv_root: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    compat: str | None = None

    def __post_init__(self):
        if (self.data is None) != (self.metric is None):
            raise ConfigError(
                "data and metric belong together: a question file and how its answers are scored"
            )
        if self.data is None and self.tasks is None and self.suite is None:
            raise ConfigError("nothing to evaluate: give tasks, a suite, or data and metric")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ConfigError(
                f"protocol {self.protocol!r} is unknown;{did_you_mean(self.protocol, PROTOCOLS)} "
                f"choose one of {', '.join(PROTOCOLS)}"
            )
        if "{question}" not in self.prompt:
            raise ConfigError(f"prompt {self.prompt!r} does not contain {{question}}")
        check_ranges(self, limit=COUNT, max_new_tokens=COUNT)
