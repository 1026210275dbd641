"""From files with the published columns to the files that VLMEvalKit scores, for every task.

(design: evaluation.md 5, 7, 8) The tests are over all tasks and protocols of the registry, so a new
benchmark is tested here as soon as its columns are in `published_columns`, and fails without them.
"""

import csv
import dataclasses
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openpyxl
import pytest
from mini_data import read_rows
from published_columns import NEEDED, TABLE

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.evaluation.job_config import JudgeConfig
from internvlx_jax.evaluation.judge import EndpointJudge, RequestBudget
from internvlx_jax.evaluation.records import read_rows as stored_rows
from internvlx_jax.evaluation.rescore import rescore
from internvlx_jax.evaluation.scoring import ScoringError
from internvlx_jax.evaluation.selection import select
from internvlx_jax.evaluation.sources import Roots
from internvlx_jax.evaluation.task_run import TaskRun
from internvlx_jax.evaluation.tasks import PROTOCOLS, TASKS

PROTOCOL = "vlmevalkit"
# Every task under every protocol, and those with a TSV file of VLMEvalKit.
ALL = [(protocol, name) for name, task in TASKS.items() for protocol in task.protocols]
OF_VLMEVALKIT = [
    name
    for protocol, name in ALL
    if protocol == PROTOCOL and TASKS[name].protocols[PROTOCOL].dataset
]
# Test splits, whose references only a server has.
SERVER = {"vqav2_testdev", "vizwiz_test", "docvqa_test", "infovqa_test"} | {
    name for name in TASKS if name.startswith("mmbench") and "_test_" in name
}
JUDGED = {
    name for name in TASKS if name.startswith(("mmvet", "llavabench", "mathv"))
}  # scored by a judge in any case
# Beginnings of judge prompts, and replies that can be read; "A" otherwise.
REPLIES = {
    "\nCompare the ground truth": "0.5",
    "[Context]": "8 4",
    "\nPlease read": "3",
    "Please read": "3",
    "\nI am providing": "12",
    "\nBelow are two answers": "1",
}


@pytest.fixture(scope="module")
def endpoint():
    """Starts a judge that answers in its own way; "m" fails twice for every prompt first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with lock:
                asked = (body["model"], prompt, body["temperature"])
                server.tries[asked] += 1
                failing = {1: 503, 2: 429} if body["model"] == "m" else {}
                status = failing.get(server.tries[asked], 200)
            reply = next((REPLIES[text] for text in REPLIES if prompt.startswith(text)), "A")
            reply = "Yes" if "The options are only Yes / No" in prompt else reply
            data = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.tries = Counter()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EndpointJudge.__init__.__kwdefaults__, "pause", 0.001)
        yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def judged(endpoint, data_root, configure, run_on, tmp_path_factory):
    """All tasks under all protocols, answered and judged -> (folder, summary) by both names."""
    results = {}
    for protocol in PROTOCOLS:
        out = tmp_path_factory.mktemp("published") / "out"
        config = configure(
            out,
            tasks=",".join(name for each, name in ALL if each == protocol),
            protocol=protocol,
            data_root=str(data_root),
            max_new_tokens=4,
            batch_size=8,
            dynamic=False,
            judge=JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="m"),
        )
        results |= {(protocol, each.task): (out / "run", each) for each in run_on(config)}
    return results


def read_cells(path):
    """The rows of a TSV file."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def table(path):
    """The rows of PATH.xlsx, or of PATH.tsv where an answer does not fit into xlsx."""
    xlsx, tsv = (path.with_name(path.name + ending) for ending in (".xlsx", ".tsv"))
    if tsv.is_file():
        return read_cells(tsv)
    sheet = openpyxl.load_workbook(xlsx).active
    header, *rows = sheet.iter_rows(values_only=True)
    return [dict(zip(header, row, strict=True)) for row in rows]


def dropped(data_root, tmp_path, dataset, column):
    """Copies a TSV file without one of its columns."""
    rows = read_cells(data_root / "tsv" / f"{dataset}.tsv")
    (tmp_path / "tsv").mkdir(exist_ok=True)
    target = tmp_path / "tsv" / f"{dataset}.tsv"
    with target.open("w", encoding="utf-8", newline="") as file:
        names = [name for name in rows[0] if name != column]
        writer = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def test_the_columns_of_every_dataset_are_known():
    """What a table has to hold is known for every dataset that a task writes a table for."""
    datasets = {TASKS[name].protocols[protocol].dataset for protocol, name in ALL}
    assert datasets - {""} == TABLE.keys()


@pytest.mark.parametrize("task", OF_VLMEVALKIT)
def test_the_first_missing_column_is_named_before_a_model_is_loaded(task, data_root, tmp_path):
    spec = TASKS[task].protocols[PROTOCOL]
    (path,) = spec.source.files(Roots(data_root, data_root / "tsv"))
    for column in ("index", *NEEDED[spec.dataset]):
        dropped(data_root, tmp_path, path.stem, column)
        with pytest.raises(ConfigError, match=f"{path.stem}.tsv line 1: no column {column}\\b"):
            select(
                EvaluationConfig(
                    tasks=task,
                    protocol=PROTOCOL,
                    data_root=str(data_root),
                    tsv_root=str(tmp_path / "tsv"),
                )
            )


def test_an_answer_column_without_answers_is_an_error(data_root, tmp_path):
    dropped(data_root, tmp_path, "RealWorldQA", "none")
    path = tmp_path / "tsv" / "RealWorldQA.tsv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(row | {"answer": ""} for row in rows)
    with pytest.raises(ConfigError, match="column answer has no value in any row"):
        select(EvaluationConfig(tasks="realworldqa", tsv_root=str(tmp_path / "tsv")))


def test_an_index_without_a_figure_is_an_error(data_root, tmp_path):
    dropped(data_root, tmp_path, "HallusionBench", "none")
    path = tmp_path / "tsv" / "HallusionBench.tsv"
    text = path.read_text(encoding="utf-8").replace("image_VD_illusion_0_0_1", "7")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="line 2: index 7 has no set, figure and question"):
        select(EvaluationConfig(tasks="hallusionbench", tsv_root=str(tmp_path / "tsv")))


@pytest.mark.parametrize("protocol, task", ALL)
def test_every_task_goes_from_its_data_to_the_file_of_vlmevalkit(protocol, task, judged, data_root):
    folder, summary = judged[protocol, task]
    spec = TASKS[task].protocols[protocol]
    assert (summary.task, summary.protocol) == (task, protocol)
    assert summary.errors == 0 and (summary.score is None) == (task in SERVER)
    assert summary.judge != "pending" and (task not in JUDGED or summary.judge["model"] == "m")
    place = (folder if spec.joined else folder / task) / f"run_{spec.dataset}"
    if not spec.dataset:
        assert not [*(folder / task).glob("run_*.xlsx"), *(folder / task).glob("run_*.tsv")]
        return
    rows = table(place)
    assert {"index", "prediction", *TABLE[spec.dataset]} <= rows[0].keys()
    if protocol == PROTOCOL:
        (path,) = spec.source.files(Roots(data_root, data_root / "tsv"))
        source = [row["index"] for row in read_cells(path)]
        assert len(rows) == len(source), "complete, or run.py --mode eval skips it"
        if task != "refcoco_all":  # VLMEvalKit puts the split in front of the index
            assert [str(row["index"]) for row in rows] == source
    answers = {row.get("answer") for row in rows}
    assert task not in ("pope", "mme", "hallusionbench") or answers == {"Yes", "No"}


def test_every_prompt_of_the_judge_failed_twice(judged, endpoint):
    tries = [count for (model, *_), count in endpoint.tries.items() if model == "m"]
    assert len(tries) > 50 and min(tries) >= 3


def test_judged_scores(judged):
    scores = {key: summary.score for key, (_, summary) in judged.items()}
    assert scores[PROTOCOL, "mmvet"] == scores[PROTOCOL, "llavabench"] == 50
    assert scores["internvl", "mmvet"] == scores["internvl", "llavabench"] == 50
    assert {scores[PROTOCOL, name] for name in TASKS if name.startswith("mathverse")} == {100}
    assert judged[PROTOCOL, "mmmu_val"][1].samples == 3, "the development split is answered too"


# --- nothing is lost ------------------------------------------------------------------------------


@pytest.fixture
def answered(judged, data_root, tmp_path):
    """Returns a function: task, its scorer or None -> its rows as a task run in a folder."""

    def answered(task, scorer=None):
        (spec,) = select(EvaluationConfig(tasks=task, protocol=PROTOCOL, data_root=str(data_root)))
        if scorer is not None:
            changed = dataclasses.replace(spec.protocol_spec, score=scorer)
            spec = dataclasses.replace(spec, protocol_spec=changed)
        folder, _ = judged[PROTOCOL, task]
        rows = {row.index: row for row in stored_rows(folder / task / "predictions.jsonl")}
        settings = {"protocol": PROTOCOL, "task": task, "limit": None}
        return TaskRun(spec, tmp_path / task, "run", settings, rows)

    return answered


def test_a_scorer_that_raises_loses_no_answer(answered, data_root, tmp_path):
    def broken(rows, context):
        raise KeyError("capability")

    with pytest.raises(ScoringError, match="mmvet: scoring failed .KeyError: 'capability'"):
        answered("mmvet", broken).finish()
    path = tmp_path / "mmvet" / "predictions.jsonl"
    rows = read_rows(path)
    assert len(rows) == 2 and all(row["score"] is None for row in rows)
    summary = rescore(str(path), data_root=str(data_root))
    assert summary.judge == "pending" and len(read_rows(path)) == 2


def test_data_that_a_scorer_cannot_take_are_refused_before_generation(data_root, monkeypatch):
    def broken(rows, context):
        raise KeyError("capability")

    task = TASKS["mmvet"]
    spec = dataclasses.replace(task.protocols[PROTOCOL], score=broken)
    changed = dataclasses.replace(task, protocols={PROTOCOL: spec})
    monkeypatch.setitem(TASKS, "mmvet", changed)
    with pytest.raises(ConfigError, match="MMVet.tsv cannot be scored .KeyError: 'capability'"):
        select(EvaluationConfig(tasks="mmvet", protocol=PROTOCOL, data_root=str(data_root)))


def test_a_judge_that_goes_away_leaves_the_task_pending(answered, endpoint, tmp_path):
    task_run = answered("mmvet")
    config = JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="n", budget=1)
    summary = task_run.finish(config.open(task_run.folder))
    assert (summary.score, summary.judge) == (None, "pending")
    assert "all 1 requests of --judge_budget are sent" in summary.notes[-2]
    assert len(list((task_run.folder / "judge_cache").iterdir())) == 1, "the reply is kept"
    again = answered("mmvet").finish(dataclasses.replace(config, budget=1).open(task_run.folder))
    assert again.score == 50, "one reply from the cache, one asked now"


def test_a_judge_that_is_down_shows_in_the_exit_status(command, checkpoint, data_root, tmp_path):
    status, text, _ = command(
        "--no_dynamic",
        checkpoint=checkpoint,
        tasks="mmvet,pope",
        protocol=PROTOCOL,
        data_root=data_root,
        dtype="float32",
        max_new_tokens=4,
        judge_url="http://localhost:9",
        judge_model="m",
        judge_retries=1,
    )
    assert status == 4 and "| pending |" in text
    for task in ("mmvet", "pope"):
        summary = json.loads((tmp_path / "out" / "run" / task / "summary.json").read_text())
        assert summary["judge"] == "pending" and summary["score"] is None
        assert any("the judge gave no more replies" in note for note in summary["notes"])
        assert len(read_rows(tmp_path / "out" / "run" / task / "predictions.jsonl")) == 2


def test_a_budget_is_shared_by_the_tasks_of_a_job(answered, endpoint):
    budget = RequestBudget(3)
    config = JudgeConfig(url=f"http://localhost:{endpoint.server_port}", model="o")
    for task, score in (("mmvet", 50), ("llavabench", None)):
        task_run = answered(task)
        assert task_run.finish(config.open(task_run.folder, budget)).score == score
    assert budget.sent == 3


def test_judge_settings_are_checked():
    for name in ("concurrency", "retries"):
        with pytest.raises(ConfigError, match=f"judge_{name} is 0, it must be at least 1"):
            JudgeConfig(url="u", model="m", **{name: 0})
    with pytest.raises(ConfigError, match="judge_budget is -1"):
        JudgeConfig(budget=-1)
