"""All benchmarks, one file each; docs/evaluation.md shows how to add one."""

from __future__ import annotations

from internvlx_jax.core.errors import ConfigError, did_you_mean
from internvlx_jax.core.evaluation_config import PROTOCOLS
from internvlx_jax.evaluation.tasks import (
    ai2d,
    blink,
    chartqa,
    chartqapro,
    docvqa,
    gqa,
    hallusionbench,
    infovqa,
    llavabench,
    mathverse,
    mathvision,
    mathvista,
    mmbench,
    mme,
    mmmu,
    mmmu_pro,
    mmstar,
    mmvet,
    muirbench,
    mvbench,
    ocrbench,
    okvqa,
    pope,
    realworldqa,
    refcoco,
    scienceqa,
    seed,
    seed2plus,
    textvqa,
    videomme,
    vizwiz,
    vqav2,
)
from internvlx_jax.evaluation.tasks.task import ProtocolSpec, Task

__all__ = [
    "GROUPS",
    "PROTOCOLS",
    "SUITES",
    "TASKS",
    "ProtocolSpec",
    "Task",
    "find_tasks",
]

_MODULES = (
    textvqa,
    docvqa,
    chartqa,
    okvqa,
    infovqa,
    gqa,
    vqav2,
    vizwiz,
    mmbench,
    mme,
    mmvet,
    mmmu,
    pope,
    seed,
    ai2d,
    scienceqa,
    hallusionbench,
    mathvista,
    llavabench,
    realworldqa,
    mmstar,
    ocrbench,
    mmmu_pro,
    mathvision,
    mathverse,
    refcoco,
    seed2plus,
    chartqapro,
    blink,
    muirbench,
    mvbench,
    videomme,
)

TASKS: dict[str, Task] = {task.name: task for module in _MODULES for task in module.TASKS}

# The paper's twenty benchmarks, on splits with public references where one exists.
SUITES = {
    "x20": (
        "textvqa_val",
        "docvqa_val",
        "chartqa_human",
        "chartqa_aug",
        "okvqa_val",
        "infovqa_val",
        "gqa_testdev",
        "vqav2_val",
        "vizwiz_val",
        "mmbench_dev_en",
        "mme",
        "mmvet",
        "mmmu_val",
        "pope",
        "seed",
        "ai2d_test",
        "scienceqa",
        "hallusionbench",
        "mathvista",
        "llavabench",
        "realworldqa",
    ),
    # The benchmarks of the InternVL3 report that exist here, in the order of its tables; again on
    # splits with public references where one exists.
    "internvl3": (
        "mmmu_val",
        "mathvista",
        "mathvision",
        "mathverse_vision_only",
        "ai2d_test",
        "ai2d_no_mask",
        "chartqa_human",
        "chartqa_aug",
        "textvqa_val",
        "docvqa_val",
        "infovqa_val",
        "ocrbench",
        "seed2plus",
        "blink",
        "muirbench",
        "realworldqa",
        "mme",
        "mmbench_dev_en",
        "mmbench_dev_cn",
        "mmbench_v11_dev_en",
        "mmvet",
        "mmstar",
        "hallusionbench",
        "pope",
        *(name for name, *_ in refcoco.SPLITS),
        "videomme",
        "mvbench",
    ),
}

# Tasks whose mean is reported as well.
GROUPS = {
    "chartqa": ("chartqa_human", "chartqa_aug"),
    "mmmu_pro": ("mmmu_pro_standard", "mmmu_pro_vision"),
    "refcoco": tuple(name for name, *_ in refcoco.SPLITS),
}


def find_tasks(
    names: str | None, suite: str | None, protocol: str | None
) -> list[tuple[Task, str, ProtocolSpec]]:
    """Finds tasks by name, each once, as (task, protocol, the task under it).

    Args:
        names: names with commas between them.
        suite: name of a suite, whose tasks come after `names`.
        protocol: name of the protocol; None takes the default of each task.

    Raises:
        ConfigError: a name is unknown, and the message has the nearest one; or a task is not
            defined under the protocol.
    """
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
    found = []
    for task in (TASKS[name] for name in dict.fromkeys(wanted)):
        chosen = protocol or task.default_protocol
        if chosen not in task.protocols:
            raise ConfigError(
                f"task {task.name} is not defined under protocol {chosen}; "
                f"it has {', '.join(task.protocols)}"
            )
        found.append((task, chosen, task.protocols[chosen]))
    return found
