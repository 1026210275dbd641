"""The settings of an evaluation job (design: evaluation.md 2). Nothing here imports jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.ranges import COUNT, NUMBER, SEED, Range, check_ranges
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.core.tile_config import MOST_TILES
from internvlx_jax.evaluation.judge import EndpointJudge, Judge, NoJudge, RequestBudget
from internvlx_jax.evaluation.selection import check_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The endpoint of a judge; without a URL judged benchmarks stay pending.

    Attributes:
        url: an OpenAI-compatible endpoint.
        model: the model to ask there.
        cache: folder of its replies; judge_cache in the folder of the task by default.
        concurrency: requests at a time.
        retries: most tries per request, with growing pauses between them.
        budget: most requests of a job, retries included; None for any number.
    """

    url: str | None = None
    model: str | None = None
    cache: str | None = None
    concurrency: int = 8
    retries: int = 5
    budget: int | None = None

    def __post_init__(self):
        if (self.url is None) != (self.model is None):
            raise ConfigError(
                "judge_url and judge_model belong together: the endpoint and the model to ask there"
            )
        check_ranges(self, "judge_", concurrency=COUNT, retries=COUNT, budget=NUMBER)

    def open(self, folder: Path, budget: RequestBudget | None = None) -> Judge:
        """Returns the judge of a task.

        Args:
            folder: folder of the task.
            budget: what is left of the requests of the job; None starts with all of them.
        """
        if self.url is None or self.model is None:
            return NoJudge()
        return EndpointJudge(
            self.url,
            self.model,
            as_path(self.cache) if self.cache else folder / "judge_cache",
            workers=self.concurrency,
            retries=self.retries,
            budget=budget or RequestBudget(self.budget),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen, whatever the task.

    Attributes:
        sampling: how a token is chosen.
        seed: randomness together with the number of a question.
        stop_strings: texts that end an answer.
    """

    sampling: Sampling = Sampling()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self):
        check_ranges(self, seed=SEED)
        if "" in self.stop_strings:
            raise ConfigError(
                "stop_string is an empty text, which would end every answer at once; leave it out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """The settings of a job; None takes the checkpoint's own.

    Attributes:
        checkpoint: a Hugging Face folder, a run folder, or one step of it.
        out_dir: folder of the results.
        selection: what is asked.
        ema: take the average of a run's trained parameters.
        tile_rule, max_num, dynamic: replace the tiling of the checkpoint.
        batch_size: rows per batch over all devices.
        dtype: dtype of parameters and activations.
        decoding: how tokens are chosen.
        judge: who grades what rules cannot decide.
        mesh: devices.
        resume: go on with an interrupted job; without it unfinished answers are an error.
        shard: "i/n": answer only every n-th question from i on, without the other shards.
        merge: join the shards of a job and score them.
    """

    checkpoint: str
    out_dir: str
    selection: EvaluationConfig
    ema: bool = False
    tile_rule: str | None = None
    max_num: int | None = None
    dynamic: bool | None = None
    batch_size: int = 16
    dtype: str = "bfloat16"
    decoding: Decoding = Decoding()
    judge: JudgeConfig = JudgeConfig()
    mesh: MeshConfig = MeshConfig()
    resume: bool = False
    shard: str | None = None
    merge: bool = False

    def __post_init__(self):
        check_names(self.selection)
        check_ranges(self, max_num=Range(1, MOST_TILES), batch_size=COUNT)
        _ = self.shard_of  # refuses a wrong shard at once

    @property
    def shard_of(self) -> tuple[int, int]:
        """(i, n) of `shard`, (0, 1) without one."""
        if self.shard is None:
            return 0, 1
        try:
            i, n = map(int, self.shard.split("/"))
        except ValueError:
            i, n = -1, 0
        if not 0 <= i < n:
            raise ConfigError(f"shard is {self.shard!r}; give i/n with 0 <= i < n, such as 0/4")
        return i, n

    @property
    def model_name(self) -> str:
        """Name of the checkpoint in folders and tables: RUN-STEP, or the name of the folder."""
        path = as_path(self.checkpoint).resolve()
        step = path.parent.name == "checkpoints"
        name = f"{path.parents[1].name}-{path.name}" if step else path.name
        return f"{name}-ema" if self.ema else name
