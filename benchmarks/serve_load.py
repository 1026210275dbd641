"""What the server does under hostile input, under load, and after a kill.

    python benchmarks/serve_load.py mutate --requests 10000 --out mutate.json
    python benchmarks/serve_load.py clients --clients 64 --seconds 120 --out clients.json
    python benchmarks/serve_load.py restart --out restart.json
    python benchmarks/serve_load.py offline --out offline.json

The first three start `internvlx serve` in a process of its own. All take a model of the demo's
size with random weights, or `--checkpoint`, print a summary and write the numbers as JSON.

`mutate` sends requests with a fault (tests/mutated_requests.py) and counts statuses, hangs and the
growth of the server's memory. `clients` asks the same questions one at a time and with many clients
that leave at random, compares every completed answer, and measures questions per second with 1 and
8 clients beside `load(...).generate`. `restart` kills the server while it answers and starts it
again, with the compiled programs of the first start. `offline` compares the engine with batches
of `generate` in one process (serve_offline.py). Times count on a quiet machine only.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import serve  # noqa: E402
from mutated_requests import (  # noqa: E402
    bomb_png,
    data_url,
    image_message,
    mutated,
    png,
    text_message,
)
from serve_offline import offline  # noqa: E402

COMMANDS = ("mutate", "clients", "restart", "offline")
HANG_SECONDS = 60
TILE = 112  # pixels of a side of the demo's tiles


def main() -> None:
    flags = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(flags.cache or Path(folder) / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        flags.checkpoint = flags.checkpoint or demo_like(Path(folder) / "run")
        commands = {"mutate": mutate, "clients": clients, "restart": restart, "offline": offline}
        report = commands[flags.command](flags, environment, Path(folder))
    print("\n".join(f"{name}: {value}" for name, value in report.items()))
    if flags.out:
        flags.out.write_text(json.dumps(report, indent=2) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in COMMANDS}
    for command in made.values():
        command.add_argument("--checkpoint", help="random weights of the demo's size if unset")
        command.add_argument("--dtype", default="float32")
        command.add_argument("--slots", type=int, default=8)
        command.add_argument("--max_length", type=int, default=512)
        command.add_argument("--max_tiles", type=int, default=7)
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--cache", type=Path, help="folder that keeps compiled programs")
        command.add_argument("--log", type=Path, help="receives what the server writes")
        command.add_argument("--out", type=Path, help="receives the numbers as JSON")
    made["mutate"].add_argument("--requests", type=int, default=10_000)
    made["mutate"].add_argument("--warm", type=int, default=1000, help="requests before measuring")
    made["mutate"].add_argument("--most_seconds", type=float, default=3600, help="ends earlier")
    made["mutate"].add_argument("--senders", type=int, default=4)
    made["mutate"].set_defaults(max_body_mib=4)
    made["clients"].add_argument("--clients", type=int, default=64)
    made["clients"].add_argument("--seconds", type=float, default=120)
    made["clients"].add_argument("--questions", type=int, default=64)
    made["clients"].add_argument("--max_tokens", type=int, default=32, help="where speed is timed")
    made["offline"].add_argument("--questions", type=int, default=96)
    made["offline"].add_argument("--max_tokens", type=int, default=48)
    made["offline"].add_argument("--batch_size", type=int, default=16, help="rows of a batch")
    made["offline"].add_argument("--rounds", type=int, default=5)
    made["offline"].add_argument("--stop", default="e", help="ends answers; empty for none")
    return parser


def demo_like(folder: Path) -> str:
    """Writes a run folder with the demo's model at random weights; returns its path."""
    import jax

    from internvlx_jax.checkpoints.run_writer import CheckpointWriter, write_run_folder
    from internvlx_jax.core.overrides import to_dict
    from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
    from internvlx_jax.data.tokenizer import Tokenizer
    from internvlx_jax.models.params import abstract_model

    config = runpy.run_path(str(ROOT / "configs" / "demo.py"))["get_config"]().model
    shapes, rng = abstract_model(config, dtype="float32").shapes, np.random.default_rng(0)
    # Large enough that answers differ.
    params = {
        path: jax.numpy.asarray(np.float32(rng.normal(0, 0.3, leaf.shape)))
        for path, leaf in shapes.items()
    }
    settings = {"train": {}, "model": to_dict(config)}
    write_run_folder(folder, settings, Tokenizer.load(TOKENIZER_FOLDER))
    with CheckpointWriter(folder, keep_last=1) as writer:
        writer.save(1, params, {"count": jax.numpy.int32(1)}, settings)
    return str(folder)


# --- one exchange ---------------------------------------------------------------------------------


def ask(address: tuple[str, int], body: bytes) -> tuple[int, str]:
    """Returns status and text of one completion on a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=HANG_SECONDS)
    try:
        connection.request("POST", "/v1/chat/completions", body)
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    finally:
        connection.close()


def resident(pid: int) -> float:
    """Returns the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


# --- hostile input --------------------------------------------------------------------------------


def mutate(flags: argparse.Namespace, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Sends requests with a fault; returns what became of them and of the server."""
    process, _, address = serve.start(flags, environment)
    found: dict[str, Any] = {
        "requests": 0, "statuses": collections.Counter(), "wrong": [], "hangs": 0,
        "slowest_seconds": 0.0, "memory_mib": [],
    }  # fmt: skip
    lock, bomb = threading.Lock(), bomb_png()

    def send(number: int) -> None:
        data = mutated(random.Random(f"{flags.seed}:{number}"), "model", bomb)
        begun = time.monotonic()
        try:
            status, text = ask(address, data)
        except TimeoutError:
            with lock:
                found["hangs"] += 1
            return
        except (OSError, http.client.HTTPException) as error:
            status, text = 0, repr(error)
        seconds = time.monotonic() - begun
        with lock:
            found["statuses"][status] += 1
            found["slowest_seconds"] = round(max(found["slowest_seconds"], seconds), 2)
            if not well_answered(status, text):
                found["wrong"].append((number, status, text[:200]))

    try:
        with ThreadPoolExecutor(flags.senders) as pool:
            list(pool.map(send, range(flags.warm)))
            found["statuses"].clear()
            until = time.monotonic() + flags.most_seconds
            for first in range(0, flags.requests, 500):
                if time.monotonic() > until:
                    break
                found["memory_mib"].append(round(resident(process.pid), 1))
                last = min(first + 500, flags.requests)
                list(pool.map(send, range(flags.warm + first, flags.warm + last)))
                found["requests"] = last
        found["memory_mib"].append(round(resident(process.pid), 1))
        good = {"messages": text_message("Still there?"), "max_tokens": 8}
        found["good_after"] = ask(address, json.dumps(good).encode())[0] == 200
        counted = serve.metrics(address)
        found["compiles_after_start"] = counted["internvlx_compiles_total"]
        found["busy_after"] = counted["internvlx_busy"]
        found["crashes"] = int(process.poll() is not None)
    finally:
        process.terminate()
        process.wait(60)
    found["growth_mib"] = round(found["memory_mib"][-1] - found["memory_mib"][0], 1)
    found["statuses"] = dict(sorted(found["statuses"].items()))
    return found


def well_answered(status: int, text: str) -> bool:
    """Returns whether a reply is an answer, or an error of the client as JSON."""
    if status == 200:
        return True
    try:
        fields = set(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return False
    return 400 <= status < 500 and fields == {"message", "type", "param", "code"}


# --- many clients ---------------------------------------------------------------------------------


def questions(count: int, seed: int, max_tiles: int) -> list[dict[str, Any]]:
    """Returns bodies of mixed lengths, images and options that a server has room for."""
    draw, made = random.Random(seed), []
    for i in range(count):
        number = draw.choice([0, 0, 1, 1, 1, 2])
        # One image of up to 6 tiles and a thumbnail, or images of one tile.
        most = 260 if number == 1 and max_tiles >= 7 else TILE
        pages = [
            data_url(png(draw.randrange(60, most), draw.randrange(60, most), 10 * i + page))
            for page in range(number)
        ]
        text = f"Question {i}? " + "word " * draw.choice([0, 5, 40, 90])
        messages = image_message(text, *pages) if pages else text_message(text)
        body = {"messages": messages, "max_tokens": draw.choice([1, 8, 24, 60]), "stream": True}
        body |= draw.choice([{}, {}, {"temperature": 0.9, "top_p": 0.9, "seed": i}, {"stop": "e"}])
        made.append(body | {"stream_options": {"include_usage": True}})
    return made


def stream(address: tuple[str, int], body: dict[str, Any], leave_after: int | None) -> str | None:
    """Returns the whole streamed answer; None if the client left, or was told to come again."""
    connection = http.client.HTTPConnection(*address, timeout=HANG_SECONDS)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body).encode())
        if leave_after == 0:
            return None
        reply = connection.getresponse()
        if reply.status == 429:
            reply.read()
            time.sleep(1)
            return None
        assert reply.status == 200, reply.read()
        text, seen = "", 0
        while line := reply.readline():
            if not line.startswith(b"data: {"):
                continue
            event, seen = json.loads(line[6:]), seen + 1
            assert "error" not in event, event
            text += event["choices"][0]["delta"].get("content", "") if event["choices"] else ""
            if leave_after is not None and seen >= leave_after:
                return None
        return text
    finally:
        connection.close()


def clients(flags: argparse.Namespace, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Compares answers of many clients with those of one, then measures speed."""
    asked = questions(flags.questions, flags.seed, flags.max_tiles)
    counts: collections.Counter[str] = collections.Counter()
    lock = threading.Lock()
    with serve.serving(flags, environment) as (_, address):
        alone = [stream(address, body, None) for body in asked]
        until = time.monotonic() + flags.seconds

        def work(number: int) -> None:
            draw = random.Random(f"{flags.seed}:{number}")
            while time.monotonic() < until:
                which = draw.randrange(len(asked))
                leaves = draw.randrange(5) if draw.random() < 0.2 else None
                try:
                    text = stream(address, asked[which], leaves)
                except Exception as error:
                    kind = f"failed: {type(error).__name__}"
                else:
                    kind = "left or refused" if text is None else "different"
                    kind = "equal" if text is not None and text == alone[which] else kind
                with lock:
                    counts[kind] += 1

        with ThreadPoolExecutor(flags.clients) as pool:
            list(pool.map(work, range(flags.clients)))
        deadline = time.monotonic() + 30
        while (state := serve.metrics(address))["internvlx_busy"] and time.monotonic() < deadline:
            time.sleep(0.1)
    report = {
        "clients": flags.clients,
        "seconds": flags.seconds,
        **dict(counts),
        "distinct_answers": len(set(alone)),
        "compiles_after_start": state["internvlx_compiles_total"],
        "busy_after": state["internvlx_busy"],
        "answered": state["internvlx_answered_total"],
        "cancelled": state["internvlx_cancelled_total"],
    }
    return report | speed(flags, environment, folder)


def speed(flags: argparse.Namespace, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Returns questions per second at 1 and 8 clients, to those of `generate` one at a time."""
    asked = []
    for i in range(flags.questions):
        path = folder / f"page-{i}.png"
        side = 200 if flags.max_tiles >= 7 else TILE
        path.write_bytes(png(side, side, seed=i))
        asked.append((f"What is stamped on page {i}?", str(path)))
    before = serve.alone(flags, asked, environment)
    with serve.serving(flags, environment) as (_, address):
        serve.exchange(address, asked, flags, clients=8)
        rows = [serve.exchange(address, asked, flags, clients=number) for number in (1, 8)]
    after = serve.alone(flags, asked, environment)
    python = len(asked) / ((before[0] + after[0]) / 2)
    equal = [row.pop("answers") == before[1] for row in rows]
    return {
        "python_per_second": [round(len(asked) / each[0], 2) for each in (before, after)],
        "one_client_to_python": round(rows[0]["per_second"] / python, 2),
        "eight_clients_to_python": round(rows[1]["per_second"] / python, 2),
        "same_answers_as_python": equal,
        "rows": rows,
    }


# --- restart --------------------------------------------------------------------------------------


def restart(flags: argparse.Namespace, environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Kills the server while it answers, and starts it again."""
    asked = questions(16, flags.seed, flags.max_tiles)
    process, cold, address = serve.start(flags, environment)
    alone = [stream(address, body, None) for body in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        for body in asked:
            pool.submit(stream, address, body | {"max_tokens": 200}, None)
        time.sleep(0.3)
        busy = serve.metrics(address)["internvlx_busy"]
        process.send_signal(signal.SIGKILL)
        process.wait()
    process, warm, address = serve.start(flags, environment)
    try:
        again = [stream(address, body, None) for body in asked]
    finally:
        process.terminate()
        process.wait(60)
    return {
        "ready_cold_seconds": cold,
        "ready_warm_seconds": warm,
        "warm_to_cold": round(warm / cold, 3),
        "busy_when_killed": busy,
        "same_answers": again == alone,
    }


if __name__ == "__main__":
    main()
