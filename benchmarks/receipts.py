"""Trains, stops, resumes and evaluates on real receipts (configs/receipts_tiny.py).

    python benchmarks/receipts.py

Needs the sample data that the config names. Prints one JSON object: the training loss at the start
and at the end, the step at which the run stopped and resumed, and the score on receipts that it has
not seen. That score is poor, because 60 small steps teach the form of an answer, not reading. The
exit status is 1 if the loss has not halved.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

CONFIG = "configs/receipts_tiny.py"
RUN = Path("runs/receipts_tiny")
QUESTIONS = Path("../shared/data/receipts/val_vqa.jsonl")
PROMPT = "{question}\nAnswer the question using a single word or phrase."
STOP_AFTER = 30


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if data is missing or the loss has not halved.
    """
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if not QUESTIONS.is_file():
        print(
            f"error: {QUESTIONS} is missing; put the sample data beside the checkout",
            file=sys.stderr,
        )
        return 1
    shutil.rmtree(RUN, ignore_errors=True)
    started = time.perf_counter()
    train = ["train.py", "--config", CONFIG, "--set", f"output_dir={RUN}"]
    python(*train, "--stop_after", str(STOP_AFTER))
    python(*train)
    trained = time.perf_counter()
    evaluate()
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    summary, evaluation_run = (
        json.loads((RUN / "eval" / name).read_text()) for name in ("summary.json", "run.json")
    )
    result = {
        "steps": rows[-1]["step"],
        "stopped_and_resumed_at": STOP_AFTER,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "executables": rows[-1]["executables"],
        "train_seconds": round(trained - started),
        "anls": summary["score"],
        "questions": summary["samples"],
        "eval_seconds": round(evaluation_run["seconds"]),
    }
    print(json.dumps(result, indent=2))
    return 0 if losses[-1] < losses[0] / 2 else 1


def evaluate() -> None:
    """Scores the run on receipts that it has not seen."""
    flags = {
        "checkpoint": RUN,
        "data": QUESTIONS,
        "metric": "anls",
        "prompt": PROMPT,
        "out_dir": RUN / "eval",
        "dtype": "float32",
        "batch_size": 8,
        "max_new_tokens": 24,
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    python("eval.py", *words)


def python(*args: str) -> None:
    """Runs a script with this interpreter."""
    subprocess.run([sys.executable, *args], check=True)


if __name__ == "__main__":
    sys.exit(main())
