"""How fast the server answers, beside the same questions asked one at a time from Python.

    python benchmarks/serve.py --checkpoint runs/demo/train --data runs/demo/data/test.jsonl

Starts `internvlx serve` in a process of its own and asks the questions of a file (see
`eval.py --data`) with 1, 8 and 32 clients at a time, each with the next question as soon as it has
its answer. Prints time to the first token, tokens and questions per second, and, for the ratio,
the same questions through `load(...).generate` one after the other in a third process, before and
after. Also starts the server twice to say how long it takes until it is ready, without and with
compiled programs in the cache.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ALONE = """
import json, sys, time
import internvlx_jax as ivx
checkpoint, dtype, tokens, path = sys.argv[1:]
asked = json.load(open(path))
model = ivx.load(checkpoint, dtype=dtype, batch_size=1)
for text, image in asked:
    model.generate(text, image, max_new_tokens=int(tokens))
begun = time.perf_counter()
answers = [model.generate(text, image, max_new_tokens=int(tokens)) for text, image in asked]
print(json.dumps([time.perf_counter() - begun, answers]))
"""


def main() -> None:
    flags = parser().parse_args()
    asked = questions(flags.data, flags.questions)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        before = alone(flags, asked, environment)
        with serving(flags, environment) as (cold, address):
            exchange(address, asked, flags, clients=flags.slots)  # its threads and pages are warm
            rows = [exchange(address, asked, flags, clients) for clients in flags.clients]
            counted = metrics(address)
        after = alone(flags, asked, environment)
        with serving(flags, environment) as (warm, _):
            pass
    report = {
        "questions": len(asked),
        "slots": flags.slots,
        "ready_cold_seconds": cold,
        "ready_warm_seconds": warm,
        "alone_per_second": [round(len(asked) / seconds, 3) for seconds, _ in (before, after)],
        "compiles_after_start": counted["internvlx_compiles_total"],
        "equal_answers": [
            sum(a == b for a, b in zip(row.pop("answers"), before[1], strict=True)) for row in rows
        ],
        "clients": rows,
    }
    one_at_a_time = len(asked) / ((before[0] + after[0]) / 2)
    for row in rows:
        row["ratio"] = round(row["per_second"] / one_at_a_time, 2)
    if flags.out:
        flags.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="question file with images")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max_length", type=int)
    parser.add_argument("--max_tiles", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--log", type=Path, help="receives what the server writes")
    parser.add_argument("--out", type=Path, help="receives the numbers as JSON")
    return parser


def questions(path: Path, count: int) -> list[tuple[str, str]]:
    """Returns (text, path of the image) of the first questions, each file read once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
    return [(row["question"], str(path.parent / row["image"])) for row in rows]


def alone(
    flags: argparse.Namespace, asked: list[tuple[str, str]], environment: dict[str, str]
) -> tuple[float, list[str]]:
    """Returns seconds and answers of `generate`, one question after the other."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(asked, file)
        file.flush()
        arguments = [flags.checkpoint, flags.dtype, str(flags.max_tokens), file.name]
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *arguments],
            check=True, capture_output=True, text=True, env=environment,
        )  # fmt: skip
    seconds, answers = json.loads(done.stdout.splitlines()[-1])
    return seconds, answers


def start(
    flags: argparse.Namespace, environment: dict[str, str]
) -> tuple[subprocess.Popen, float, tuple[str, int]]:
    """Starts the server; returns it, the seconds until it was ready, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "internvlx_jax", "serve", "--checkpoint", flags.checkpoint]
    command += ["--port", str(port), "--dtype", flags.dtype, "--slots", str(flags.slots)]
    command += ["--model_name", "model", "--queue", "256"]
    for name in ("max_length", "max_tiles", "max_body_mib"):
        if getattr(flags, name, None) is not None:
            command += [f"--{name}", str(getattr(flags, name))]
    begun = time.perf_counter()
    with open(flags.log or os.devnull, "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    while not is_ready(("127.0.0.1", port)):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}")
        time.sleep(0.1)
    return process, round(time.perf_counter() - begun, 1), ("127.0.0.1", port)


@contextmanager
def serving(
    flags: argparse.Namespace, environment: dict[str, str]
) -> Iterator[tuple[float, tuple[str, int]]]:
    """Runs the server; yields the seconds until it was ready, and its address."""
    process, seconds, address = start(flags, environment)
    try:
        yield seconds, address
    finally:
        process.terminate()
        process.wait(60)


def is_ready(address: tuple[str, int]) -> bool:
    try:
        return get(address, "/health")[0] == 200
    except OSError:
        return False


def get(address: tuple[str, int], path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address, timeout=10)
    connection.request("GET", path)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def metrics(address: tuple[str, int]) -> dict[str, float]:
    lines = get(address, "/metrics")[1].splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def exchange(
    address: tuple[str, int], asked: list[tuple[str, str]], flags: argparse.Namespace, clients: int
) -> dict[str, Any]:
    """Asks all questions with so many clients at a time."""
    local = threading.local()

    def ask(question: tuple[str, str]) -> tuple[float, float, int, str]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(*address, timeout=600)
        begun = time.perf_counter()
        local.connection.request("POST", "/v1/chat/completions", body(question, flags.max_tokens))
        reply = local.connection.getresponse()
        assert reply.status == 200, reply.read()
        first, text, tokens = 0.0, "", 0
        while line := reply.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            first = first or time.perf_counter() - begun
            text += event["choices"][0]["delta"].get("content", "") if event["choices"] else ""
            tokens = event.get("usage", {}).get("completion_tokens", tokens)
        return first, time.perf_counter() - begun, tokens, text

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(ask, asked))
    seconds = time.perf_counter() - begun
    first = np.array([each[0] for each in done])
    return {
        "clients": clients,
        "per_second": round(len(asked) / seconds, 3),
        "tokens_per_second": round(sum(each[2] for each in done) / seconds, 2),
        "first_token_p50": round(float(np.percentile(first, 50)), 3),
        "first_token_p95": round(float(np.percentile(first, 95)), 3),
        "answers": [each[3] for each in done],
    }


def body(question: tuple[str, str], tokens: int) -> bytes:
    text, path = question
    url = f"data:image/png;base64,{base64.b64encode(Path(path).read_bytes()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return json.dumps(
        {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()


def table(report: dict[str, Any]) -> str:
    lines = [
        "| clients | questions/s | to one at a time | tokens/s | first token p50 / p95 (s) |",
        "|---|---|---|---|---|",
    ]
    for row in report["clients"]:
        lines.append(
            f"| {row['clients']} | {row['per_second']} | {row['ratio']} | "
            f"{row['tokens_per_second']} | {row['first_token_p50']} / {row['first_token_p95']} |"
        )
    before, after = report["alone_per_second"]
    cold, warm = report["ready_cold_seconds"], report["ready_warm_seconds"]
    lines += [
        "",
        f"One at a time from Python: {before} questions/s before, {after} after.",
        f"Ready after {cold} s, and {warm} s with programs in the cache.",
        f"Answers equal to those of Python: {report['equal_answers']} of {report['questions']}.",
        f"Programs compiled after the start: {report['compiles_after_start']:g}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
