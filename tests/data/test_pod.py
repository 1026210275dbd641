"""Several processes on this machine.

The same steps, through kills and on another number of processes (data.md 14, 17).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pod_process import ROW_QUANTUM, make_loaders, rows_digest

STEPS = 500
FOLDER = Path(__file__).parent


def chat(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="module")
def meta(tmp_path_factory) -> Path:
    """Three datasets with weights: images, several images and texts.

    One sample in eight is bad, some of them only when their image is decoded.
    """
    folder, rng = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0)
    for number in range(24):
        size = rng.integers(20, 90, 2)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:60])
    names = [f"{number}.png" for number in range(24)]
    lines = {"pages": [], "pairs": [], "texts": []}
    for number in range(80):
        answer = "word " * int(rng.integers(1, 12))
        image = "broken.png" if number % 8 == 1 else names[number % 24]
        lines["pages"].append(
            {"image": image, "width": 28, "height": 28, "conversations": chat("What?", answer)}
        )
        lines["pairs"].append(
            {
                "image": list(rng.choice(names, 2)),
                "conversations": chat("<image> or <image>?", answer),
            }
        )
        lines["texts"].append({"conversations": chat("Say it. " * int(rng.integers(1, 9)), answer)})
        lines["texts"].append("{broken" if number % 8 == 3 else lines["texts"][-1])
    fields = {}
    for (name, samples), weight in zip(lines.items(), (3, 1, 0.5)):
        path = folder / f"{name}.jsonl"
        path.write_text(
            "".join(
                (line if isinstance(line, str) else json.dumps(line)) + "\n" for line in samples
            )
        )
        fields[name] = {"root": str(folder), "annotation": str(path), "weight": weight}
    path = folder / "meta.json"
    path.write_text(json.dumps(fields))
    make_loaders(str(path), {}, 0, 1)  # the indexes are there before several processes want them
    return path


def environment():
    """One CPU device a process, and no need of others."""
    return os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join([str(FOLDER), str(FOLDER.parents[1])]),
    }


def start(meta: Path, folder: Path) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [
                sys.executable,
                FOLDER / "pod_process.py",
                str(rank),
                "2",
                port,
                meta,
                folder,
                str(STEPS),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]


def wait_for(condition, seconds: float) -> bool:
    """Whether the condition became true in time."""
    end = time.monotonic() + seconds
    while not (reached := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return reached


def lines_of(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


@pytest.mark.slow
def test_two_processes_take_the_same_500_steps_are_killed_and_go_on_as_one_would(meta, tmp_path):
    """In both modes; one process, which itself restarts from the position of the two, has the same
    global batches.
    """
    stop = random.SystemRandom().randrange(60, STEPS - 60)
    processes = start(meta, tmp_path)
    try:
        assert wait_for(
            lambda: (
                len(lines_of(tmp_path / "steps-1.jsonl")) > 2 * stop
                or processes[0].poll() is not None
            ),
            120,
        )
        for process in processes:
            process.kill()
        first_outputs = [process.communicate()[0] for process in processes]
        position = json.loads((tmp_path / "state.json").read_text())
        assert 0 < position["tokens"]["step"] < STEPS, first_outputs
        processes = start(meta, tmp_path)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    found = [{}, {}]
    for rank in (0, 1):
        for line in lines_of(tmp_path / f"steps-{rank}.jsonl"):
            known = found[rank].setdefault((line["mode"], line["step"]), line)
            assert known == line, "the steps that were repeated after the kill are the same"
        assert found[rank].keys() == {
            (mode, step) for mode in ("tokens", "pack") for step in range(STEPS)
        }
    assert len({tuple(line["shape"]) for line in found[0].values()}) >= 4
    faults = [json.loads((tmp_path / f"faults-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(rank[mode][0][1] > 0 for rank in faults for mode in rank), (
        "bad samples were met and replaced"
    )

    fresh, restarted = make_loaders(str(meta), {}, 0, 1), make_loaders(str(meta), position, 0, 1)
    for mode in fresh:
        begun = position[mode]["step"]
        steps = [*fresh[mode].steps(0, begun), *restarted[mode].steps(begun, STEPS)]
        for number, step in enumerate(steps):
            lines = [found[rank][mode, number] for rank in (0, 1)]
            tokens = step.batch.inputs.tokens
            shape = [*tokens.shape, step.batch.inputs.tiles.shape[1]]
            assert [line["shape"] for line in lines] == [shape] * 2 and shape[0] % ROW_QUANTUM == 0
            assert [line["sum"] for line in lines] == [int(tokens.sum())] * 2
            half = len(tokens) // 2
            assert [line["rows"] for line in lines] == [
                rows_digest(step.batch, slice(0, half)),
                rows_digest(step.batch, slice(half, None)),
            ], (mode, number)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "parent killed"])
def test_worker_processes_are_spawned_and_leave_nothing_behind(end, meta, tmp_path):
    with open(tmp_path / "errors", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, FOLDER / "loader_process.py", meta],
            env=environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
        try:
            for _ in range(3):  # by then both have given a step
                assert process.stdout.readline() == "workers 1 1\n", (
                    "both are started by spawn, none by fork"
                )
            threading.Thread(
                target=process.stdout.read, daemon=True
            ).start()  # printing must not fail first

            def ended():
                # A terminal's Ctrl-C reaches the whole group, SIGKILL the parent alone. Python
                # loses a Ctrl-C that arrives while it frees an object, so a person may press it
                # twice.
                os.killpg(process.pid, end) if end == signal.SIGINT else process.send_signal(end)
                return wait_for(lambda: process.poll() is not None, 5)

            assert wait_for(ended, 30) and process.returncode in (-end, 130)

            def gone():
                try:
                    os.killpg(process.pid, 0)
                except ProcessLookupError:
                    return True
                return False

            assert wait_for(gone, 30), "workers are left"
            errors.seek(0)
            assert "Process grain" not in (output := errors.read()), (
                output
            )  # a worker that fails prints its name
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
