"""Reads batches with two worker processes until it is stopped: `python loader_process.py META`."""

import multiprocessing
import signal
import sys
from pathlib import Path

import jax
from pod_process import make_loaders


def main() -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell starts its background jobs with SIGINT ignored
    jax.block_until_ready(
        jax.numpy.ones(8).sum()
    )  # the parent holds a live backend, which a fork would break
    loader = make_loaders(sys.argv[1], {}, 0, 1, num_workers=2)["tokens"]
    for _ in loader.steps(0, 10**9):
        commands = [
            Path(f"/proc/{child.pid}/cmdline").read_text()
            for child in multiprocessing.active_children()
        ]
        print("workers", *(int("spawn_main" in command) for command in commands), flush=True)


if __name__ == "__main__":
    main()
