"""MMBench: choices, each asked with all rotations of its options."""

import dataclasses

from internvlx_jax.evaluation import scoring, submissions
from internvlx_jax.evaluation.prompts import LETTER, LETTER_CN, choice, vlm_choice
from internvlx_jax.evaluation.sources import Source, tsv, tsv_path
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit


def _folder(file: str) -> Source:
    """A TSV in data/mmbench."""

    def inside(roots):
        return dataclasses.replace(roots, tsv=roots.data / "mmbench")

    source = tsv(file)
    return Source(
        lambda roots: [tsv_path(inside(roots), file)], lambda roots: source.read(inside(roots))
    )


def _task(split: str, language: str, file: str) -> Task:
    test = split == "test"
    dataset = f"MMBench_{split.upper()}_{language.upper()}"
    server = dict(submission=submissions.mmbench) if test else {}
    return Task(name=f"mmbench_{split}_{language}", title=f"MMBench, {split}, {language}", samples=None, views={
        "internvl": internvl(_folder(file), choice(LETTER if language == "en" else LETTER_CN),
                             scoring.server_choice if test else scoring.circular, max_new_tokens=100, dataset=dataset,
                             **server),
        "vlmevalkit": vlmevalkit(tsv(dataset), vlm_choice, scoring.server if test else scoring.circular_vlm,
                                 dataset=dataset, **server),
    })  # fmt: skip


TASKS = (
    _task("dev", "en", "mmbench_dev_20230712"),
    _task("dev", "cn", "mmbench_dev_cn_20231003"),
    _task("test", "en", "mmbench_test_en_20231003"),
    _task("test", "cn", "mmbench_test_cn_20231003"),
)
