"""All benchmarks: one small file each, collected here (docs/evaluation.md shows how to add one)."""

from __future__ import annotations

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.evaluation_config import PROTOCOLS, Protocol
from internvlx_jax.evaluation.tasks import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    hallusionbench,
    infovqa,
    llavabench,
    mathvista,
    mmbench,
    mme,
    mmmu,
    mmvet,
    okvqa,
    pope,
    realworldqa,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)
from internvlx_jax.evaluation.tasks.task import ProtocolSpec, Task

__all__ = [
    "GROUPS",
    "PROTOCOLS",
    "SUITES",
    "TASKS",
    "Protocol",
    "Task",
    "ProtocolSpec",
    "find_tasks",
    "find_protocol",
]

_FILES = (textvqa, docvqa, chartqa, okvqa, infovqa, gqa, vqav2, vizwiz, mmbench, mme, mmvet, mmmu, pope, seed, ai2d,
          scienceqa, hallusionbench, mathvista, llavabench, realworldqa)  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for file in _FILES for task in file.TASKS}

# The paper's twenty benchmarks, on splits whose references are public where there is one.
SUITES = {
    "x20": ("textvqa_val", "docvqa_val", "chartqa_human", "chartqa_aug", "okvqa_val", "infovqa_val", "gqa_testdev",
            "vqav2_val", "vizwiz_val", "mmbench_dev_en", "mme", "mmvet", "mmmu_val", "pope", "seed", "ai2d_test",
            "scienceqa", "hallusionbench", "mathvista", "llavabench", "realworldqa"),
}  # fmt: skip

GROUPS = {"chartqa": ("chartqa_human", "chartqa_aug")}  # their mean is reported as well


def find_tasks(names: str | None, suite: str | None) -> list[Task]:
    """`a,b` and a suite -> tasks, each once. Raises ConfigError with the nearest name."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()]
    if suite is not None:
        if suite not in SUITES:
            raise ConfigError(
                f'suite "{suite}" is unknown.{did_you_mean(suite, SUITES)} '
                f"Use one of {', '.join(SUITES)}."
            )
        wanted += SUITES[suite]
    for name in wanted:
        if name not in TASKS:
            raise ConfigError(
                f'task "{name}" is unknown.{did_you_mean(name, TASKS)} --list shows all tasks.'
            )
    return [TASKS[name] for name in dict.fromkeys(wanted)]


def find_protocol(task: Task, protocol: Protocol | None) -> tuple[Protocol, ProtocolSpec]:
    """The task under a protocol, its own by default. Raises ConfigError if it has none."""
    protocol = protocol or task.default_protocol
    if protocol not in task.views:
        raise ConfigError(
            f"task {task.name} is not defined under protocol {protocol}; it has {', '.join(task.views)}"
        )
    return protocol, task.views[protocol]
