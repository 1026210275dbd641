"""Which questions a job asks, and how: flags -> tasks that are ready to run (spec: evaluation.md 1, 2)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from internvlx_jax.data.errors import did_you_mean
from internvlx_jax.data.tiles import TileConfig
from internvlx_jax.errors import ConfigError
from internvlx_jax.evaluation.answering import Asking
from internvlx_jax.evaluation.identity import file_hashes
from internvlx_jax.evaluation.images import Tiler
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.questions import Question, read_questions
from internvlx_jax.evaluation.scoring import COMPAT, mean_of
from internvlx_jax.evaluation.sources import Roots, Source
from internvlx_jax.evaluation.tasks import PROTOCOLS, Protocol, Task, View, find_tasks, find_view
from internvlx_jax.models.config import ModelConfig
from internvlx_jax.models.generate import Sampling

GENERIC = "generic"  # protocol of a question file
GENERIC_NEW_TOKENS = 100
ACCEPTANCE = "acceptance"  # stands for the deviations under which published numbers came about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What is asked.

    Attributes:
        data, metric, image_root, prompt: a question file, its metric, the folder of its images and how it is asked;
            `{question}` stands for the text.
        tasks, suite: benchmarks, by name. protocol: theirs by default.
        data_root, tsv_root: where their data lie; TSV files lie in data_root/tsv by default.
        limit: only the first questions of each.
        max_new_tokens: in place of the task's own.
        compat: comma-separated names of scoring.COMPAT, `none` or `acceptance`, in place of the protocol's own.
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
            raise ConfigError("data and metric belong together: a question file and how its answers are scored")
        if self.data is None and self.tasks is None and self.suite is None:
            raise ConfigError("nothing to evaluate: give tasks, a suite, or data and metric")
        if self.metric is not None and self.metric not in METRICS:
            raise ConfigError(f"metric {self.metric!r} is unknown;{did_you_mean(self.metric, METRICS)} choose one of "
                              f"{', '.join(METRICS)}")
        if self.protocol is not None and self.protocol not in PROTOCOLS:
            raise ConfigError(f"protocol {self.protocol!r} is unknown;{did_you_mean(self.protocol, PROTOCOLS)} choose "
                              f"one of {', '.join(PROTOCOLS)}")
        if "{question}" not in self.prompt:
            raise ConfigError(f"prompt {self.prompt!r} does not contain {{question}}")
        for name in ("limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}, it must be at least 1")
        for name in (self.compat or "none").split(","):
            if name not in (*COMPAT, "none", ACCEPTANCE):
                raise ConfigError(f"compat {name!r} is unknown;{did_you_mean(name, COMPAT)} choose from "
                                  f"{', '.join(COMPAT)}, {ACCEPTANCE}, none")

    def compat_of(self, view: View) -> frozenset[str]:
        if self.compat is None:
            return frozenset(view.compat)
        names = set(self.compat.split(",")) - {"none"}
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
class Unit:
    """One task of a job: its questions as they are put, whatever the model.

    Attributes:
        compat: deviations in force. hashes: of the data files. notes: what is unusual about the data.
    """

    task: Task
    protocol: str
    view: View
    questions: list[Question]
    compat: frozenset[str]
    hashes: dict[str, str]
    notes: tuple[str, ...]

    @property
    def generic(self) -> bool:
        return self.protocol == GENERIC


def select(selection: Selection) -> list[Unit]:
    """The units of a selection. Raises FileNotFoundError naming every missing file of all tasks, or ConfigError."""
    roots = Roots(Path(selection.data_root), Path(selection.tsv_root or Path(selection.data_root) / "tsv"))
    chosen = [(task, *find_view(task, selection.protocol)) for task in find_tasks(selection.tasks, selection.suite)]
    if selection.data is not None:
        task = generic_task(selection)
        chosen.append((task, GENERIC, task.views[GENERIC]))
    missing = [f"  {task.name} ({protocol}): {path}" for task, protocol, view in chosen
               for path in view.source.missing(roots)]
    if missing and selection.data is not None and len(chosen) == 1:
        raise FileNotFoundError(f"question file {selection.data} does not exist")
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} data files are missing. Nothing is downloaded: put them there, or set --data_root and "
            "--tsv_root; docs/evaluation.md says where each comes from.\n" + "\n".join(missing))
    return [_unit(task, protocol, view, roots, selection) for task, protocol, view in chosen]


def generic_task(selection: Selection) -> Task:
    """A question file as a task: the metric's mean as a fraction."""
    path = Path(selection.data)
    root = None if selection.image_root is None else Path(selection.image_root)
    view = View(source=Source(lambda roots: [path], lambda roots: read_questions(path, root, selection.limit)),
                prompt=lambda question: selection.prompt.replace("{question}", question.text),
                score=mean_of(METRICS[selection.metric], scale=1), dataset=path.stem, max_new_tokens=GENERIC_NEW_TOKENS)
    return Task(name=path.stem, title=f"{path.name}, {selection.metric}", samples=None, views={GENERIC: view})


def _unit(task: Task, protocol: str, view: View, roots: Roots, selection: Selection) -> Unit:
    questions = view.source.read(roots)
    if not questions:
        raise ConfigError(f"{task.name}: no questions in {', '.join(map(str, view.source.files(roots)))}")
    hashes, notes = file_hashes(view.source.files(roots))
    if selection.limit is None and task.samples not in (None, len(questions)):
        notes.append(f"{len(questions)} questions, the published set has {task.samples}")
    questions = [dataclasses.replace(question, prompt=view.prompt(question))
                 for question in questions[: selection.limit]]
    return Unit(task, protocol, view, questions, selection.compat_of(view), hashes, tuple(notes))


def asking_of(unit: Unit, selection: Selection, model: ModelConfig, tiles: TileConfig, max_num: int | None,
              decoding: Decoding) -> tuple[Asking, dict[str, Any]]:
    """How a model is asked the questions of a unit, and the settings that decide its answers.

    tiles: how the model cuts images; max_num: the user's own maximum, None if it is not set.
    """
    view = unit.view
    if model.projector.kind == "mlp1" and tiles.rule == "off" and max_num is None and not unit.generic:
        tiles = dataclasses.replace(tiles, max_num=unit.task.baseline_tiles)
    tiler = Tiler(tiles, view.images(tiles.dynamic), "after_tiling" if "rgb_after_tiling" in unit.compat else "first")
    asking = Asking(tiler=tiler, max_new_tokens=selection.max_new_tokens or view.max_new_tokens,
                    min_new_tokens=view.min_new_tokens, **vars(decoding))
    settings = {
        "task": unit.task.name, "protocol": unit.protocol, "limit": selection.limit,
        "tiles": dataclasses.asdict(tiles), "rgb": tiler.rgb, "template": model.prompt.template,
        "system_message": model.prompt.system_message, "max_new_tokens": asking.max_new_tokens,
        "min_new_tokens": asking.min_new_tokens, "sampling": dataclasses.asdict(decoding.sampling),
        "seed": decoding.seed, "stop_strings": list(decoding.stop_strings), "data_sha256": unit.hashes,
    }  # fmt: skip
    if unit.generic:
        settings |= {name: getattr(selection, name) for name in ("data", "metric", "image_root", "prompt")}
    return asking, settings
