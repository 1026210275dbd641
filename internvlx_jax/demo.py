"""`make demo`: a tiny InternVL-X learns to read generated pages, and is scored on pages it has not seen.

    python -m internvlx_jax.demo        (in the root of the checkout)

Training and evaluation are the commands that a user would type. Everything lies in runs/demo, which is
emptied before. The last line is `demo: exact_match=0.93 chance=0.11 blank=0.12`: the share of right answers,
that of the best answerer that sees no page, and the model's own on blank pages.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.data.synthetic import FILES, SyntheticConfig, generate
from internvlx_jax.evaluation.gallery import write_gallery
from internvlx_jax.training.report import draw_curves, figure_class

# Unless the user sets them. A program as small as this one keeps one core busy: two host devices that share the batch
# use two. XLA sizes the CPU thread pool by NPROC, and several devices can deadlock in a small pool.
ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "16"}
PAGES = SyntheticConfig()
CONFIG = "configs/demo.py"  # names DATA and TRAIN too
RUN = Path("runs/demo")
DATA, TRAIN, EVAL, EVAL_BLANK = RUN / "data", RUN / "train", RUN / "eval", RUN / "eval_blank"


def main() -> int:
    try:
        run_demo()
    except subprocess.CalledProcessError as error:
        print(f"error: exit status {error.returncode} of: {shlex.join(error.cmd)}", file=sys.stderr)
        return 1
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_demo() -> None:
    """All stages; raises CalledProcessError with the command of the one that failed."""
    for needed in ("train.py", "eval.py", CONFIG):
        if not Path(needed).is_file():
            raise ConfigError(f"{needed} is not here; run the demo in the root of the checkout")
    figure_class()  # a missing matplotlib should not show up after minutes of training
    if RUN.exists():
        shutil.rmtree(RUN)

    with stage("data"):
        chance = generate(DATA, PAGES)["chance"]
    with stage("train"):
        python("train.py", "--config", CONFIG)
    with stage("evaluate"):
        score = evaluate(DATA / FILES["val_vqa"], EVAL)
    with stage("evaluate blank pages"):
        blank = evaluate(DATA / FILES["val_blank_vqa"], EVAL_BLANK)
    with stage("draw"):
        curves = draw_curves(TRAIN, chance=chance)
        gallery = EVAL / "gallery.png"
        write_gallery(EVAL / "predictions.jsonl", gallery)

    print(f"checkpoint  {TRAIN / 'checkpoints'}")
    print(f"metrics     {TRAIN / 'metrics.jsonl'}")
    print(f"curves      {curves}")
    print(f"answers     {EVAL / 'predictions.jsonl'}")
    print(f"picture     {gallery}")
    print(f"demo: exact_match={score:.2f} chance={chance:.2f} blank={blank:.2f}")


def evaluate(questions: Path, out: Path) -> float:
    """Exact match of the trained model, as eval.py writes it."""
    python(
        "eval.py",
        "--checkpoint",
        str(TRAIN),
        "--data",
        str(questions),
        "--metric",
        "exact",
        "--out_dir",
        str(out),
        "--dtype",
        "float32",
        "--max_new_tokens",
        "8",
        "--batch_size",
        "32",
    )
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))["score"]


def python(*args: str) -> None:
    """Run a script of the checkout with this interpreter, its output passing through."""
    command = [sys.executable, *args]
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, env=ENVIRONMENT | os.environ)


@contextmanager
def stage(name: str) -> Iterator[None]:
    print(f"--- {name}", flush=True)
    started = time.perf_counter()
    yield
    print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
