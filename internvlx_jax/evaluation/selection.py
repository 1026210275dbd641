"""Which questions a job asks, from which files (design: evaluation.md 1, 2, 8)."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from internvlx_jax.core.errors import ConfigError, SampleError, did_you_mean
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.paths import as_path
from internvlx_jax.data.templates import IMAGE_PLACEHOLDER
from internvlx_jax.evaluation.judge import NoJudge
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.evaluation.questions import Question
from internvlx_jax.evaluation.scoring import COMPAT, Answered, Context, mean_of
from internvlx_jax.evaluation.sources import Roots, Source, read_questions
from internvlx_jax.evaluation.submissions import vlmevalkit_rows
from internvlx_jax.evaluation.tasks import SUITES, TASKS, ProtocolSpec, Task
from internvlx_jax.inference.videos import FRAMES

GENERIC = "generic"  # protocol of a question file
GENERIC_NEW_TOKENS = 100
# These stand for the deviations of the reference, under which published numbers came about, and for
# those of the InternVL-X release.
ACCEPTANCE, RELEASE = "acceptance", "release"

# First digits of the md5 of the published TSV files.
TSV_MD5 = {
    "MMBench_DEV_EN": "b6caf113",
    "SEEDBench_IMG": "68017231",
    "ScienceQA_TEST": "e42e9e00",
    "AI2D_TEST": "0f593e0d",
    "RealWorldQA": "4de008f5",
    "MMMU_DEV_VAL": "585e8ad7",
    "TextVQA_VAL": "b233b31f",
    "DocVQA_VAL": "d5ee77e1",
    "InfoVQA_VAL": "2342e9c2",
    "ChartQA_TEST": "c902e0aa",
    "GQA_TestDev_Balanced": "99b62f22",
    "VizWiz": "fa4ac416",
    "MathVista_MINI": "f199b98e",
    "LLaVABench": "d382a093",
    "MMVet": "748aa6d4",
    "MME": "b36b43c3",
    "HallusionBench": "0c23ac0d",
    "POPE": "c12f5acb",
    "MMBench_DEV_EN_V11": "30c05be8",
    "MMBench_TEST_EN_V11": "8d1a704e",
    "MMBench_DEV_CN_V11": "593f9b5f",
    "MMBench_TEST_CN_V11": "156e6569",
    "SEEDBench2_Plus": "e32d3216",
    "AI2D_TEST_NO_MASK": "fd8f4636",
    "MMStar": "e1ecd214",
    "BLINK": "d5e8af14",
    "MUIRBench": "2e5e6fd7",
    "MMMU_Pro_10c": "22cee868",
    "MMMU_Pro_V": "d01441a8",
    "OCRBench": "e953d98a",
    "MathVision": "93f6de14",
    "MathVision_MINI": "060fe4fa",
    "MathVerse_MINI": "5017caca",
    "MathVerse_MINI_Vision_Only": "68a11d46",
    "MathVerse_MINI_Vision_Dominant": "b8fb6385",
    "MathVerse_MINI_Vision_Intensive": "01cbd35b",
    "MathVerse_MINI_Text_Lite": "19e4b13b",
    "MathVerse_MINI_Text_Dominant": "4f5cd2fa",
    "ChartQAPro": "27653ea8",
    "RefCOCO": "f50ca356",
    "MVBench": "fd21d365",
    "Video-MME": "85bdd91f",
}


def check_names(selection: EvaluationConfig) -> None:
    """Raises ConfigError for a metric or a deviation that no scorer knows."""
    if selection.metric is not None and selection.metric not in METRICS:
        raise ConfigError(
            f"metric {selection.metric!r} is unknown;{did_you_mean(selection.metric, METRICS)} "
            f"choose one of {', '.join(METRICS)}"
        )
    for name in (selection.compat or "none").split(","):
        if name not in (*COMPAT, "none", ACCEPTANCE, RELEASE):
            raise ConfigError(
                f"compat {name!r} is unknown;{did_you_mean(name, COMPAT)} choose from "
                f"{', '.join(COMPAT)}, {ACCEPTANCE}, {RELEASE}, none"
            )


def compat_of(selection: EvaluationConfig, spec: ProtocolSpec) -> frozenset[str]:
    """Returns the deviations in force: those of the selection, else those of the protocol."""
    if selection.compat is None:
        return frozenset(spec.compat)
    names = set(selection.compat.split(",")) - {"none"}
    if ACCEPTANCE in names:
        names |= {*spec.compat}
    if RELEASE in names:
        names |= {*(spec.compat if spec.release is None else spec.release)}
    return frozenset(names - {ACCEPTANCE, RELEASE})


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """One task of a job with its questions, whatever the model.

    Attributes:
        task: the benchmark.
        protocol: whose prompts and metrics are used.
        protocol_spec: the benchmark under this protocol.
        questions: the questions with their prompts, in order.
        compat: deviations in force.
        hashes: hash of each data file.
        notes: what is unusual about the data.
    """

    task: Task
    protocol: str
    protocol_spec: ProtocolSpec
    questions: list[Question]
    compat: frozenset[str]
    hashes: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def generic(self) -> bool:
        """Whether the questions come from a question file of the user."""
        return self.protocol == GENERIC


def select(selection: EvaluationConfig) -> list[TaskSpec]:
    """Reads the tasks of a selection.

    Raises:
        FileNotFoundError: data files are missing; the message lists those of all tasks.
        ConfigError: a name is unknown, or a data file cannot be used.
    """
    check_names(selection)
    data = as_path(selection.data_root)
    tsv_root = as_path(selection.tsv_root) if selection.tsv_root else data / "tsv"
    roots = Roots(data, tsv_root, selection.frames)
    chosen = _chosen(selection.tasks, selection.suite, selection.protocol)
    if selection.data is not None and selection.metric is not None:
        path = as_path(selection.data)
        task = question_file_task(selection, path, selection.metric)
        if task.name in {each.name for each, _, _ in chosen}:
            # pope.jsonl beside the benchmark pope: no other file or score may be taken for its own
            task = dataclasses.replace(task, name=path.name)
        chosen.append((task, GENERIC, task.protocols[GENERIC]))
    chosen = _asked(chosen, selection)
    missing = [
        f"  {task.name} ({protocol}): {path}"
        for task, protocol, spec in chosen
        for path in spec.source.missing(roots)
    ]
    if missing and selection.data is not None and len(chosen) == 1:
        raise FileNotFoundError(f"question file {selection.data} does not exist")
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} data files are missing. Nothing is downloaded: fetch them, or set "
            "--data_root and --tsv_root; docs/evaluation.md says where each comes from.\n"
            + "\n".join(missing)
        )
    return [_read(task, protocol, spec, roots, selection) for task, protocol, spec in chosen]


def _chosen(
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


def _asked(
    chosen: list[tuple[Task, str, ProtocolSpec]], selection: EvaluationConfig
) -> list[tuple[Task, str, ProtocolSpec]]:
    """Returns tasks with chain of thought and number of frames as selected.

    Raises:
        ConfigError: no task of the selection has such a prompt, or none has videos.
    """
    if selection.cot:
        if not any(spec.cot for _, _, spec in chosen):
            raise ConfigError(
                f"none of {', '.join(task.name for task, _, _ in chosen)} has a prompt for a chain "
                "of thought under its protocol; leave out --cot, or see docs/evaluation.md for the "
                "tasks that have one"
            )
        chosen = [(task, protocol, spec.reasoning()) for task, protocol, spec in chosen]
    if selection.frames is not None:
        if not any(spec.frames for _, _, spec in chosen):
            raise ConfigError(
                f"none of {', '.join(task.name for task, _, _ in chosen)} has videos; leave out "
                "--frames"
            )
        chosen = [
            (task, protocol, spec.with_frames(selection.frames)) for task, protocol, spec in chosen
        ]
    return chosen


def question_file_task(selection: EvaluationConfig, path: Path, metric: str) -> Task:
    """Returns a question file as a task: its score is the mean of the metric, as a fraction."""
    root = None if selection.image_root is None else as_path(selection.image_root)
    frames = FRAMES if selection.frames is None else selection.frames

    def read(roots: Roots) -> list[Question]:
        questions = read_questions(path, root, selection.limit, frames)
        alone = selection.tasks is None and selection.suite is None
        if selection.frames is not None and alone and not any(each.frames for each in questions):
            raise ConfigError(f"{path}: no question has a video; leave out --frames")
        return questions

    spec = ProtocolSpec(
        source=Source(lambda roots: [path], read),
        frames=FRAMES,
        prompt=lambda question: selection.prompt.replace("{question}", question.text),
        score=mean_of(METRICS[metric], scale=1),
        dataset=path.stem,
        max_new_tokens=GENERIC_NEW_TOKENS,
        min_new_tokens=0,
    )
    title = f"{path.name}, {metric}"
    return Task(name=path.stem, title=title, samples=None, protocols={GENERIC: spec})


def _read(
    task: Task, protocol: str, spec: ProtocolSpec, roots: Roots, selection: EvaluationConfig
) -> TaskSpec:
    compat = compat_of(selection, spec)
    files = spec.source.files(roots)
    try:
        questions = spec.source.read(dataclasses.replace(roots, compat=compat))
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{task.name}: {', '.join(map(str, files[:3]))} cannot be read "
            f"({type(error).__name__}: {error}); download the published files again"
        ) from error
    if not questions:
        raise ConfigError(f"{task.name}: no questions in {', '.join(map(str, files))}")
    hashes, notes = _file_hashes(files)
    published = task.samples if spec.samples is None else spec.samples
    if selection.limit is None and published and published != len(questions):
        notes.append(f"{len(questions)} questions, the published set has {published}")
    try:
        asked = [each.asked(spec.prompt(each)) for each in questions[: selection.limit]]
    except SampleError as error:
        raise ConfigError(str(error)) from None
    if selection.cot and spec.cot is None:
        notes.append("this benchmark has no prompt for a chain of thought; asked directly")
    if protocol == GENERIC:
        for question in asked:
            _check_placeholders(question)
    _check_scoring(task, spec, asked, compat)
    return TaskSpec(task, protocol, spec, asked, compat, hashes, tuple(notes))


def _check_scoring(
    task: Task, spec: ProtocolSpec, questions: Sequence[Question], compat: frozenset[str]
) -> None:
    """Scores empty answers and writes them, so that nothing of it can fail after generation.

    Raises:
        ConfigError: the data cannot be scored.
    """
    try:
        spec.score([Answered(question, "") for question in questions], Context(NoJudge(), compat))
        vlmevalkit_rows(questions, [""] * len(questions), spec.table)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{task.name}: the data in {questions[0].where.partition(' line ')[0]} cannot be "
            f"scored ({type(error).__name__}: {error}); download the published files again"
        ) from error


def _check_placeholders(question: Question) -> None:
    """Refuses a question that would be asked without its image, or with too few of them."""
    found, images = question.prompt.count(IMAGE_PLACEHOLDER), len(question.images)
    if found and found != images:
        raise ConfigError(
            f'{question.where}: {images} image{"s" * (images != 1)} but {found} "<image>" in the '
            'question; name an image for each under "image", or leave "<image>" out to have the '
            "images put in front"
        )


def _file_hashes(paths: Iterable[Path]) -> tuple[dict[str, str], list[str]]:
    """Hashes data files.

    Returns:
        (sha256 of each file by FOLDER/NAME, a note for each TSV that is not the published one).
    """
    hashes, notes = {}, []
    for path in paths:
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                sha.update(block)
                md5.update(block)
        hashes[f"{path.parent.name}/{path.name}"] = sha.hexdigest()
        published = TSV_MD5.get(path.stem) if path.suffix == ".tsv" else None
        if published and not md5.hexdigest().startswith(published):
            notes.append(
                f"{path.name} is not the published file (md5 {md5.hexdigest()[:8]}, "
                f"expected {published})"
            )
    return hashes, notes
