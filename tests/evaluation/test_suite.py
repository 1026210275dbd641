"""Every benchmark end to end on made-up data.

Any number of devices, processes, shards and interruptions gives the same bytes.
"""

import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openpyxl
import pytest
from mini_data import ROOT, read_rows

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.evaluation_config import EvaluationConfig
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.line_log import LineLog
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.evaluation import job, records
from internvlx_jax.evaluation.compare import compare
from internvlx_jax.evaluation.compare_page import page
from internvlx_jax.evaluation.job_config import Decoding, EvalConfig, JudgeConfig
from internvlx_jax.evaluation.rescore import rescore
from internvlx_jax.evaluation.tasks import GROUPS, SUITES, TASKS

NEW_TOKENS = 6
MODEL = "run"  # name of the folder of the checkpoint
SMALL = dict(max_new_tokens=NEW_TOKENS, batch_size=8, dynamic=False)


def files_of(folder: Path) -> dict[str, bytes]:
    """The files that must not depend on how a job ran, by path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jsonl", ".json", ".md", ".csv") and path.name != "run.json"
    }


@pytest.fixture(scope="module")
def settings(data_root):
    return SMALL | dict(tasks=",".join(TASKS), data_root=str(data_root))


@pytest.fixture(scope="module")
def all_tasks(settings, configure, run_on, tmp_path_factory):
    """All tasks under their own protocol, on one device -> (folder, summaries)."""
    out = tmp_path_factory.mktemp("suite") / "out"
    return out / MODEL, run_on(configure(out, **settings))


def test_every_task_runs_under_its_own_protocol(all_tasks, data_root):
    folder, summaries = all_tasks
    assert [summary.task for summary in summaries] == list(TASKS)
    for summary in summaries:
        task, rows = (
            TASKS[summary.task],
            read_rows(folder / summary.task / "predictions.jsonl"),
        )
        assert (summary.protocol, summary.errors) == (task.default_protocol, 0)
        assert [row["index"] for row in rows] == list(range(summary.samples))
        assert json.loads((folder / task.name / "summary.json").read_text()) == json.loads(
            json.dumps(summary.to_json())
        )
        assert {row["finish"] for row in rows} <= {"stop", "length"} and all(
            row["tiles"] > 0 for row in rows
        )
        assert {path.name for path in (folder / task.name).iterdir()} == {
            "predictions.jsonl",
            "summary.json",
            "run.json",
            *summary.files,
        }
    assert len({row["raw"] for row in read_rows(folder / "mme" / "predictions.jsonl")}) > 10, (
        "or nothing is compared"
    )


def test_the_minimum_of_new_tokens_is_that_of_the_protocol(all_tasks):
    _, summaries = all_tasks
    minimum = {summary.task: summary.settings["min_new_tokens"] for summary in summaries}
    assert (minimum["textvqa_val"], minimum["mme"], minimum["realworldqa"]) == (1, 0, 0)


@pytest.mark.slow
def test_eight_devices_give_the_same_bytes(all_tasks, settings, configure, run_on, tmp_path):
    run_on(
        configure(
            tmp_path / "out",
            **settings | dict(batch_size=16, mesh=MeshConfig(data=2, fsdp=2, tensor=2)),
        ),
        8,
    )
    assert files_of(tmp_path / "out" / MODEL) == files_of(all_tasks[0])


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(all_tasks, settings, configure, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    flags = " --xla_force_host_platform_device_count=1"  # the last one counts
    args = [
        "--checkpoint",
        configure("o", **settings).checkpoint,
        "--tasks",
        settings["tasks"],
        "--data_root",
        settings["data_root"],
        "--no_dynamic",
        "--max_new_tokens",
        str(NEW_TOKENS),
        "--batch_size",
        "8",
        "--dtype",
        "float32",
        "--out_dir",
        str(tmp_path / "out"),
        "--coordinator",
        f"localhost:{port}",
        "--num_processes",
        "2",
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "eval.py", *args, "--process_id", str(rank)],
            text=True,
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "textvqa_val" in outputs[0] and "| task |" not in outputs[1]
    assert files_of(tmp_path / "out" / MODEL) == files_of(all_tasks[0])


def test_an_interrupted_job_goes_on_where_it_stopped(
    all_tasks, settings, configure, run_on, tmp_path, monkeypatch
):
    """A job stops inside a task with half a line on the disk: finished answers are kept."""
    three = settings | dict(tasks="textvqa_val,mme,pope", batch_size=4)
    append, written = LineLog.append, []

    def recorded(self, lines):
        lines = [*lines]
        written.append([json.loads(line)["index"] for line in lines])
        append(self, lines)

    def stops(self, lines):
        if len(written) == 3:
            append(self, [b'{"settings": "'])
            raise KeyboardInterrupt
        recorded(self, lines)

    with monkeypatch.context() as patch:
        patch.setattr(LineLog, "append", stops)
        with pytest.raises(KeyboardInterrupt):
            run_on(configure(tmp_path / "out", **three))
    folder = tmp_path / "out" / MODEL
    assert (folder / "textvqa_val" / "summary.json").is_file() and not (
        folder / "mme" / "summary.json"
    ).exists()
    with pytest.raises(ConfigError, match="unfinished job; --resume goes on"):
        run_on(configure(tmp_path / "out", **three))
    with pytest.raises(ConfigError, match="answered with other settings"):
        run_on(configure(tmp_path / "out", **three | dict(max_new_tokens=5, resume=True)))

    written.clear()
    monkeypatch.setattr(LineLog, "append", recorded)
    run_on(configure(tmp_path / "out", **three, resume=True))
    assert sum(map(len, written)) == 28 - 2 * 4 + 6, (
        "two batches of MME and all of TextVQA are kept"
    )
    expected = {
        path: text
        for path, text in files_of(all_tasks[0]).items()
        if path.split("/")[0] in ("textvqa_val", "mme", "pope")
    }
    assert {path: text for path, text in files_of(folder).items() if "/" in path} == expected

    written.clear()
    run_on(configure(tmp_path / "out", **three, resume=True))
    assert not written, "a finished job has nothing to answer"


def test_shards_join_to_the_same_bytes(all_tasks, settings, configure, run_on, tmp_path):
    two = settings | dict(tasks="mme,chartqa_human,chartqa_aug", batch_size=4)
    assert run_on(configure(tmp_path / "out", **two, shard="0/2")) == []
    with pytest.raises(ConfigError, match="14 of 28 answers are missing"):
        run_on(configure(tmp_path / "out", **two, merge=True))
    run_on(configure(tmp_path / "out", **two, shard="1/2"))
    assert len(run_on(configure(tmp_path / "out", **two, merge=True))) == 3
    for task in ("mme", "chartqa_human"):
        assert files_of(tmp_path / "out" / MODEL / task) == files_of(all_tasks[0] / task)


def test_rescoring_gives_the_same_bytes(all_tasks, data_root):
    folder, _ = all_tasks
    before = files_of(folder)
    for name in TASKS:
        rescore(str(folder / name / "predictions.jsonl"), data_root=str(data_root))
    assert files_of(folder) == before


def test_rescoring_uses_other_deviations(settings, configure, run_on, data_root, tmp_path):
    run_on(configure(tmp_path / "out", **settings | dict(tasks="chartqa_human")))
    path = tmp_path / "out" / MODEL / "chartqa_human" / "predictions.jsonl"
    rows = records.read_rows(path)
    # 9.5 is within 5 % of 10, but 10 is not within 5 % of 9.5.
    rows[0] = dataclasses.replace(rows[0], raw="9.5")
    records.write_rows(path, rows)
    swapped = rescore(str(path), data_root=str(data_root))
    assert (swapped.score, swapped.compat) == (0, ["relaxed_swap"])
    plain = rescore(str(path), data_root=str(data_root), compat="none")
    assert (plain.score, plain.compat) == (50, [])
    assert rescore(str(path), data_root=str(data_root)).score == 50, "as it was scored last"
    again = rescore(str(path), data_root=str(data_root), compat="acceptance")
    assert (again.score, again.compat) == (0, ["relaxed_swap"])
    rows[0] = dataclasses.replace(rows[0], prompt="Another one?")
    records.write_rows(path, rows)
    with pytest.raises(ConfigError, match="row 0 is not the question at .*test_human.jsonl line 1"):
        rescore(str(path), data_root=str(data_root))


def test_tables_hold_all_columns_and_the_raw_text(all_tasks, data_root):
    folder, _ = all_tasks
    sheet = openpyxl.load_workbook(folder / "realworldqa" / f"{MODEL}_RealWorldQA.xlsx").active
    header, *rows = sheet.iter_rows(values_only=True)
    with (data_root / "tsv" / "RealWorldQA.tsv").open(newline="") as file:
        source = list(csv.reader(file, delimiter="\t"))
    assert [*header] == [name for name in source[0] if name != "image"] + ["prediction"]
    raw = [row["raw"] for row in read_rows(folder / "realworldqa" / "predictions.jsonl")]
    assert [row[-1] or "" for row in rows] == raw
    assert [row[0] for row in rows] == [int(line[0]) for line in source[1:]], (
        "a number, as VLMEvalKit needs it"
    )


def test_submissions(all_tasks):
    folder, _ = all_tasks

    def predictions(task):
        return [row["prediction"] for row in read_rows(folder / task / "predictions.jsonl")]

    def submission(task):
        return json.loads((folder / task / "submission.json").read_text())

    def named(key, ids, task):
        return [{key: id, "answer": text} for id, text in zip(ids, predictions(task))]

    assert submission("vqav2_testdev") == named("question_id", (10, 11), "vqav2_testdev")
    assert submission("docvqa_test") == named("questionId", (10, 11), "docvqa_test")
    assert submission("vizwiz_test") == named("image", ("0.png", "1.png"), "vizwiz_test")
    assert submission("mmvet") == dict(zip(("v1_10", "v1_11"), predictions("mmvet")))
    sheet = openpyxl.load_workbook(folder / "mmbench_test_en" / "submission.xlsx").active
    header, *rows = sheet.iter_rows(values_only=True)
    assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert [row[6] or "" for row in rows] == predictions("mmbench_test_en")


def test_the_report_has_a_row_a_task_and_the_mean_of_chartqa(all_tasks):
    folder, summaries = all_tasks
    rows = list(csv.DictReader((folder / "report.csv").open()))
    means = [f"{group} (mean)" for group in GROUPS]
    assert [row["task"] for row in rows] == [*TASKS, *means] and "chartqa (mean)" in means
    markdown = (folder / "report.md").read_text().splitlines()
    assert len(markdown) == len(rows) + 2 and all(line.count(" | ") == 8 for line in markdown[2:])
    pending = {row["task"] for row in rows if row["score"] == "pending"}
    judged = {"mmvet", "llavabench", "mathvista", "mathvision", "mathvision_mini"}
    assert pending == judged | {name for name in TASKS if name.startswith("mathverse")}
    requests = read_rows(folder / "mmvet" / "judge_requests.jsonl")
    assert len(requests) == 2 and "x <AND> y" in requests[0]["messages"][0]["content"]


def test_jobs_are_compared_with_images_of_every_layout(all_tasks, tmp_path):
    """Another model is right where the first one is wrong; only frames of videos are not shown."""
    folder, summaries = all_tasks
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    scored = [each.task for each in summaries if each.score is not None]
    for task in scored:
        path = other / task / "predictions.jsonl"
        rows = records.read_rows(path)
        records.write_rows(
            path,
            [row if row.score is None else dataclasses.replace(row, score=9.0) for row in rows],
        )
    comparison = compare([folder, other], resamples=100)
    assert len(comparison.models) == 2 and len(comparison.cells) == len(TASKS)
    differences = {
        entry.scored.summary.task for entry in comparison.entries.values() if entry.difference
    }
    assert differences == {*scored} and [task for task, _ in comparison.cells] == [*TASKS]
    text = page(comparison, worst=1)
    assert text.count("<article>") == len(scored)
    shown = {task for task in scored if task not in ("mvbench", "videomme")}
    assert text.count("data:image/jpeg") >= len(shown)
    unread = re.findall(r'<p class="worse">([^<]*)', text)
    assert all("frame" in problem or "clip" in problem for problem in unread), unread


def test_missing_files_are_listed_together_before_the_model_loads(command, data_root, tmp_path):
    status, _, error = command(
        checkpoint=ROOT / "tests/golden/internlm2", suite="x20", data_root=tmp_path / "nothing"
    )
    assert status == 1 and "data files are missing" in error
    for task in SUITES["x20"]:
        assert f"  {task} (" in error
    assert str(tmp_path / "nothing" / "tsv" / "HallusionBench.tsv") in error


def test_the_command_lists_tasks_and_names_the_nearest(command, data_root, checkpoint):
    status, text, _ = command("--list", data_root=data_root)
    assert status == 0 and len(text.splitlines()) == 1 + sum(
        len(task.protocols) for task in TASKS.values()
    )
    assert not [line for line in text.splitlines()[1:] if "missing" in line]
    status, _, error = command(checkpoint=checkpoint, tasks="texvqa_val")
    assert status == 1 and 'Did you mean "textvqa_val"?' in error
    status, _, error = command(checkpoint=checkpoint, task="x")
    assert status == 2 and 'Did you mean "--tasks"?' in error
    status, _, error = command(
        checkpoint=checkpoint, tasks="realworldqa", protocol="internvl", data_root=data_root
    )
    assert status == 1 and "not defined under protocol internvl; it has vlmevalkit" in error


def test_a_question_keeps_its_randomness_in_any_batch(settings, configure, run_on, tmp_path):
    """Sampled texts depend on the seed and the question, not on the batch."""
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.2)
    texts = {}
    for name, size, seed in (("a", 4, 0), ("b", 4, 1), ("c", 8, 0)):
        decoding = Decoding(sampling=sampling, seed=seed, stop_strings=("e",))
        run_on(
            configure(
                tmp_path / name,
                **settings | dict(tasks="mme", limit=5, batch_size=size, decoding=decoding),
            )
        )
        texts[name] = [
            row["raw"] for row in read_rows(tmp_path / name / MODEL / "mme" / "predictions.jsonl")
        ]
    assert texts["a"] == texts["c"] != texts["b"]
    assert not any("e" in text for text in texts["a"]), "stop strings are cut off"


def test_flags_become_settings(command, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "run", lambda config: seen.append(config) or [])
    assert (
        command(
            "--resume",
            "--no_dynamic",
            checkpoint="c",
            tasks="a,b",
            suite="x20",
            protocol="internvl",
            data_root="d",
            tsv_root="t",
            limit=3,
            tile_rule="area",
            max_num=12,
            batch_size=5,
            max_new_tokens=9,
            temperature=0.5,
            top_k=7,
            top_p=0.25,
            repetition_penalty=1.5,
            seed=4,
            stop_string="END",
            dtype="float32",
            compat="acceptance",
            shard="1/2",
            judge_url="u",
            judge_model="m",
            judge_cache="j",
            judge_concurrency=3,
            judge_retries=2,
            judge_budget=9,
            mesh_fsdp=2,
            out_dir="o",
        )[0]
        == 0
    )
    assert seen == [
        EvalConfig(
            checkpoint="c",
            out_dir="o",
            tile_rule="area",
            max_num=12,
            dynamic=False,
            batch_size=5,
            dtype="float32",
            selection=EvaluationConfig(
                tasks="a,b",
                suite="x20",
                protocol="internvl",
                data_root="d",
                tsv_root="t",
                limit=3,
                max_new_tokens=9,
                compat="acceptance",
            ),
            decoding=Decoding(
                sampling=Sampling(temperature=0.5, top_k=7, top_p=0.25, repetition_penalty=1.5),
                seed=4,
                stop_strings=("END",),
            ),
            judge=JudgeConfig(url="u", model="m", cache="j", concurrency=3, retries=2, budget=9),
            mesh=MeshConfig(fsdp=2),
            resume=True,
            shard="1/2",
        )
    ]
