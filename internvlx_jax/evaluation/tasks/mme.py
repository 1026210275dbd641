"""MME: two yes or no questions an image, in fourteen tasks."""

from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.evaluation import scoring
from internvlx_jax.evaluation.metrics.yes_no import MME_COGNITION, MME_PERCEPTION
from internvlx_jax.evaluation.prompts import BASE, ending
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.sources import Roots, Source, tsv
from internvlx_jax.evaluation.tasks.task import Task, internvl, vlmevalkit

IMAGES = "mme/MME_Benchmark_release_version"
KINDS = (*MME_PERCEPTION, *MME_COGNITION)


def _files(roots: Roots) -> list[Path]:
    """TASK.txt of each task; InternVL keeps them beside its scripts, so that place is tried too."""
    folders = (roots.data / "mme" / "Your_Results", roots.data.parent / "eval" / "mme" / "Your_Results",
               roots.data / IMAGES)  # fmt: skip
    folder = next(
        (folder for folder in folders if (folder / f"{KINDS[0]}.txt").is_file()), folders[0]
    )
    return [folder / f"{kind}.txt" for kind in KINDS]


def _read(roots: Roots) -> list[Question]:
    questions = []
    for kind, file in zip(KINDS, _files(roots), strict=True):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            where = f"{file} line {number}"
            try:
                name, text, answer = line.split("\t")[:3]
            except ValueError:
                raise ConfigError(
                    f"{where}: expected image, question and answer with tabs between them"
                ) from None
            places = (
                roots.data / IMAGES / kind / name,
                roots.data / IMAGES / kind / "images" / name,
            )
            image = next((path for path in places if path.is_file()), places[0])
            questions.append(
                Question(
                    where,
                    f"{kind}/{name}/{number}",
                    (str(image),),
                    text,
                    (answer.strip(),),
                    fields={"category": kind, "image_path": f"{kind}/{name}"},
                )
            )
    return questions


PROMPT = ending(f" {BASE}")

TASKS = (
    Task(name="mme", title="MME, perception + cognition", samples=2374, views={
        "internvl": internvl(Source(_files, _read), PROMPT, scoring.mme, max_new_tokens=20, min_new_tokens=0,
                             dataset="MME"),
        "vlmevalkit": vlmevalkit(tsv("MME"), PROMPT, scoring.mme_vlm, dataset="MME"),
    }),
)  # fmt: skip
