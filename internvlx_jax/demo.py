"""`make demo`: a tiny InternVL-X learns to read generated pages, and is scored on new ones.

    python -m internvlx_jax.demo        (in the root of the checkout)

Training and evaluation are the commands that a user would type. Everything lies in runs/demo, which
is emptied first. The last line is
`demo: exact_match=1.00 chance=0.09 blank=0.09 visual_tokens=4.4 (InternVL: 13.1)`:
the share of right answers, the same for the best answerer that sees no page, the same for the model
on blank pages, and the visual tokens that its three compressors spend on a validation page (see
`Spent`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import load_config_file
from internvlx_jax.data.images import image_size
from internvlx_jax.data.synthetic import FILES, SyntheticConfig, generate
from internvlx_jax.data.tiles import tile_count
from internvlx_jax.evaluation.gallery import write_gallery
from internvlx_jax.training.report import draw_curves, figure_class

# Defaults, which the user's environment overrides. A program as small as this one keeps one core
# busy; two host devices that share the batch use two. XLA sizes the CPU thread pool by NPROC, and
# several devices can deadlock in a small pool.
ENVIRONMENT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "16"}
# Device nodes of TPUs, NVIDIA GPUs (the second under WSL) and AMD GPUs.
ACCELERATORS = ("accel*", "vfio/*", "nvidia*", "dxg", "kfd")
PAGES = SyntheticConfig()
CONFIG = "configs/demo.py"  # names DATA and TRAIN too
RUN = Path("runs/demo")
DATA, TRAIN, EVAL, EVAL_BLANK = RUN / "data", RUN / "train", RUN / "eval", RUN / "eval_blank"


@dataclasses.dataclass(frozen=True)
class Spent:
    """Holds what the compressors spend per page, on average over validation pages of one image.

    InternVL's way is its tile rule, which cuts every page for its aspect ratio up to the same
    maximum (`off`), and one token of `mlp1` per 2 x 2 patches (256 per tile at full size, 4 here)
    in every decoder layer.

    Attributes:
        tiles: Tiles cut by RVTC, thumbnails included.
        tiles_off: The same without RVTC.
        shallow: Visual tokens in the decoder layers before LVTC's expansion.
        deep: Visual tokens from the expansion on.
        tokens: The mean of both over all layers.
        internvl: Visual tokens in every layer in InternVL's way.
    """

    tiles: float
    tiles_off: float
    shallow: float
    deep: float
    tokens: float
    internvl: float

    @classmethod
    def of(cls, model: ModelConfig, sizes: Sequence[tuple[int, int]]) -> Spent:
        """Counts for pages of these (width, height)."""
        edge = model.prompt.tiles
        tiles, tiles_off = (
            sum(tile_count(rule, *size) for size in sizes) / len(sizes)
            for rule in (edge, dataclasses.replace(edge, rule="off"))
        )
        low = high = model.token_grid
        first_deep, layers = 0, model.decoder.layers
        if model.lvtc is not None:
            low, high, first_deep = (
                model.lvtc.low_grid,
                model.lvtc.high_grid,
                model.lvtc.expand_layer,
            )
        shallow, deep = tiles * low**2, tiles * high**2
        tokens = (first_deep * shallow + (layers - first_deep) * deep) / layers
        return cls(
            tiles, tiles_off, shallow, deep, tokens, tiles_off * (model.vision.grid // 2) ** 2
        )


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
    """Runs all stages.

    Raises:
        CalledProcessError: A stage failed; the error holds its command.
        ConfigError: The working folder is not the root of a checkout.
    """
    for needed in ("train.py", "eval.py", CONFIG):
        if not Path(needed).is_file():
            raise ConfigError(f"{needed} is missing; run the demo in the root of the checkout")
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

    spent = Spent.of(load_config_file(CONFIG).model, page_sizes(DATA / FILES["val_vqa"]))
    print(
        f"RVTC: {spent.tiles:.2f} tiles per page, {spent.tiles_off:.2f} without it "
        f"({1 - spent.tiles / spent.tiles_off:.0%} saved)"
    )
    print(
        f"PVTC and LVTC: {spent.shallow:.1f} visual tokens per page in shallow decoder layers, "
        f"{spent.deep:.1f} in deep ones, {spent.tokens:.1f} on average; "
        f"{spent.internvl:.1f} in all layers in InternVL's way"
    )
    print(f"checkpoint  {TRAIN / 'checkpoints'}")
    print(f"metrics     {TRAIN / 'metrics.jsonl'}")
    print(f"curves      {curves}")
    print(f"answers     {EVAL / 'predictions.jsonl'}")
    print(f"picture     {gallery}")
    print(
        f"demo: exact_match={score:.2f} chance={chance:.2f} blank={blank:.2f} "
        f"visual_tokens={spent.tokens:.1f} (InternVL: {spent.internvl:.1f})"
    )


def evaluate(questions: Path, out: Path) -> float:
    """Evaluates the trained model with eval.py and returns its exact match."""
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


def page_sizes(questions: Path) -> list[tuple[int, int]]:
    """Returns (width, height) of each page that is asked about."""
    rows = map(json.loads, questions.read_text(encoding="utf-8").splitlines())
    return [
        image_size(questions.parent / name) for name in dict.fromkeys(row["image"] for row in rows)
    ]


def python(*args: str) -> None:
    """Runs a script of the checkout with this interpreter, its output passing through."""
    command = [sys.executable, *args]
    print(f"$ {shlex.join(command)}", flush=True)
    # libtpu, which is installed for its compiler, complains about a missing TPU whenever jax looks
    # for one.
    quiet = {} if has_accelerator() else {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, env=ENVIRONMENT | quiet | os.environ)


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Returns whether jax could find more than a CPU.

    The answer is always yes outside Linux, where only jax itself could tell.
    """
    return sys.platform != "linux" or any(any(devices.glob(name)) for name in ACCELERATORS)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Prints the name of a stage, and the seconds that it took."""
    print(f"--- {name}", flush=True)
    started = time.perf_counter()
    yield
    print(f"--- {name}: {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
