"""Which questions a job asks, and how: flags -> tasks that are ready to run (design: evaluation.md 1, 2)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.evaluation.identity import file_hashes
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.questions import Question, read_questions
from internvlx_jax.evaluation.scoring import COMPAT, mean_of
from internvlx_jax.evaluation.sources import Roots, Source
from internvlx_jax.evaluation.tasks import (
    ProtocolSpec,
    Task,
    find_protocol,
    find_tasks,
)
from internvlx_jax.inference.requests import GenerationSpec
from internvlx_jax.inference.tiling import Tiler

GENERIC = "generic"  # protocol of a question file
GENERIC_NEW_TOKENS = 100
ACCEPTANCE = "acceptance"  # stands for the deviations under which published numbers came about


def check_names(selection: EvaluationConfig) -> None:
    """Raises ConfigError for a metric or a deviation that no scorer knows."""
    if selection.metric is not None and selection.metric not in METRICS:
        raise ConfigError(
            f"metric {selection.metric!r} is unknown;{did_you_mean(selection.metric, METRICS)} choose one of "
            f"{', '.join(METRICS)}"
        )
    for name in (selection.compat or "none").split(","):
        if name not in (*COMPAT, "none", ACCEPTANCE):
            raise ConfigError(
                f"compat {name!r} is unknown;{did_you_mean(name, COMPAT)} choose from "
                f"{', '.join(COMPAT)}, {ACCEPTANCE}, none"
            )


def compat_of(selection: EvaluationConfig, view: ProtocolSpec) -> frozenset[str]:
    if selection.compat is None:
        return frozenset(view.compat)
    names = set(selection.compat.split(",")) - {"none"}
    if ACCEPTANCE in names:
        names = names - {ACCEPTANCE} | {*view.compat, *view.acceptance}
    return frozenset(names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are chosen, whatever the task."""

    sampling: Sampling = Sampling()
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One task of a job: its questions as they are put, whatever the model.

    Attributes:
        compat: deviations in force. hashes: of the data files. notes: what is unusual about the data.
    """

    task: Task
    protocol: str
    protocol_spec: ProtocolSpec
    questions: list[Question]
    compat: frozenset[str]
    hashes: dict[str, str]
    notes: tuple[str, ...]

    @property
    def generic(self) -> bool:
        return self.protocol == GENERIC


def select(selection: EvaluationConfig) -> list[TaskSpec]:
    """The units of a selection. Raises FileNotFoundError naming every missing file of all tasks, or ConfigError."""
    check_names(selection)
    roots = Roots(
        Path(selection.data_root), Path(selection.tsv_root or Path(selection.data_root) / "tsv")
    )
    chosen = [
        (task, *find_protocol(task, selection.protocol))
        for task in find_tasks(selection.tasks, selection.suite)
    ]
    if selection.data is not None:
        task = generic_task(selection)
        chosen.append((task, GENERIC, task.protocols[GENERIC]))
    missing = [
        f"  {task.name} ({protocol}): {path}"
        for task, protocol, view in chosen
        for path in view.source.missing(roots)
    ]
    if missing and selection.data is not None and len(chosen) == 1:
        raise FileNotFoundError(f"question file {selection.data} does not exist")
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} data files are missing. Nothing is downloaded: put them there, or set --data_root and "
            "--tsv_root; docs/evaluation.md says where each comes from.\n" + "\n".join(missing)
        )
    return [_unit(task, protocol, view, roots, selection) for task, protocol, view in chosen]


def generic_task(selection: EvaluationConfig) -> Task:
    """A question file as a task: the metric's mean as a fraction."""
    path = Path(selection.data)
    root = None if selection.image_root is None else Path(selection.image_root)
    view = ProtocolSpec(
        source=Source(
            lambda roots: [path], lambda roots: read_questions(path, root, selection.limit)
        ),
        prompt=lambda question: selection.prompt.replace("{question}", question.text),
        score=mean_of(METRICS[selection.metric], scale=1),
        dataset=path.stem,
        max_new_tokens=GENERIC_NEW_TOKENS,
    )
    return Task(
        name=path.stem,
        title=f"{path.name}, {selection.metric}",
        samples=None,
        protocols={GENERIC: view},
    )


def _unit(
    task: Task, protocol: str, view: ProtocolSpec, roots: Roots, selection: EvaluationConfig
) -> TaskSpec:
    questions = view.source.read(roots)
    if not questions:
        raise ConfigError(
            f"{task.name}: no questions in {', '.join(map(str, view.source.files(roots)))}"
        )
    hashes, notes = file_hashes(view.source.files(roots))
    if selection.limit is None and task.samples not in (None, len(questions)):
        notes.append(f"{len(questions)} questions, the published set has {task.samples}")
    questions = [
        dataclasses.replace(question, prompt=view.prompt(question))
        for question in questions[: selection.limit]
    ]
    return TaskSpec(
        task, protocol, view, questions, compat_of(selection, view), hashes, tuple(notes)
    )


def generation_spec(
    unit: TaskSpec,
    selection: EvaluationConfig,
    model: ModelConfig,
    tiles: TileConfig,
    max_num: int | None,
    decoding: Decoding,
) -> tuple[GenerationSpec, dict[str, Any]]:
    """How a model is asked the questions of a unit, and the settings that decide its answers.

    tiles: how the model cuts images; max_num: the user's own maximum, None if it is not set.
    """
    view = unit.protocol_spec
    if (
        model.projector.kind == "mlp1"
        and tiles.rule == "off"
        and max_num is None
        and not unit.generic
    ):
        tiles = dataclasses.replace(tiles, max_num=unit.task.baseline_tiles)
    tiler = Tiler(
        tiles,
        view.images(tiles.dynamic),
        "after_tiling" if "rgb_after_tiling" in unit.compat else "first",
    )
    asking = GenerationSpec(
        tiler=tiler,
        max_new_tokens=selection.max_new_tokens or view.max_new_tokens,
        min_new_tokens=view.min_new_tokens,
        **vars(decoding),
    )
    settings = {
        "task": unit.task.name, "protocol": unit.protocol, "limit": selection.limit,
        "tiles": dataclasses.asdict(tiles), "rgb": tiler.rgb, "template": model.prompt.template,
        "system_message": model.prompt.system_message, "max_new_tokens": asking.max_new_tokens,
        "min_new_tokens": asking.min_new_tokens, "sampling": dataclasses.asdict(decoding.sampling),
        "seed": decoding.seed, "stop_strings": list(decoding.stop_strings), "data_sha256": unit.hashes,
    }  # fmt: skip
    if unit.generic:
        settings |= {
            name: getattr(selection, name) for name in ("data", "metric", "image_root", "prompt")
        }
    return asking, settings
