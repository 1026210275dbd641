"""Kills a run in two processes at random moments, and compares its end with an undisturbed one.

The tests of runs share its functions. As a program it is a test that is too long for the suite:

    python tests/training/kill_run.py --folder runs/kill --kills 10 --steps 200

It trains a tiny model on generated texts twice: once undisturbed, and once killed (SIGKILL) again
and again, at moments drawn with --seed: while it starts, at a step, and inside a save (as soon as
orbax's temporary folder appears). Every start is the same command, on 2 processes x 4 simulated CPU
devices, or one with 8. It prints one line per kill and one JSON object. The exit status is 1 if
parameters, optimizer state or metrics differ in a single bit, if a start went on from a step that
was not complete, if something is left beside the checkpoints, or if fewer than two kills of ten
were inside a save.

--faults puts the killed run behind gs://, on a server of this machine which answers 5 % of the
requests with 503, cuts 2 % of the answers and delays 2 % by a second. --stage writes its
checkpoints to a local folder first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

CONFIG = """import json
from pathlib import Path
from internvlx_jax.core.overrides import from_dict
from internvlx_jax.core.run_config import TrainConfig

def get_config():
    return from_dict(TrainConfig, json.loads(Path(__file__).with_suffix(".json").read_text()))
"""
PATIENCE = 600  # seconds until something that has to happen must have happened
UNFINISHED = "*orbax-checkpoint-tmp*"
SAME = ("step", "loss", "grad_norm", "param_norm", "learning_rate")


class Kill(NamedTuple):
    """A moment: `start` while the run starts, `step` when it is logged, `save` inside its save."""

    kind: str
    step: int


def plan_kills(kills: int, steps: int, save_every: int, generator: random.Random) -> list[Kill]:
    """Returns kills in order of their steps: a third inside a save, a tenth while it starts."""
    kinds = ["save"] * max(1, kills // 3) + ["start"] * (kills // 10)
    kinds += ["step"] * (kills - len(kinds))
    generator.shuffle(kinds)
    moments = sorted(generator.sample(range(2, steps - 1), kills))
    plan = []
    for kind, step in zip(kinds, moments):
        if kind == "save":
            step = min(-(-step // save_every) * save_every, (steps - 1) // save_every * save_every)
        plan.append(Kill(kind, step))
    return sorted(plan, key=lambda kill: kill.step)


def start(config: Path, devices: int, *flags: str, processes: int = 2) -> list[subprocess.Popen]:
    """Starts `train.py` with this config in several processes."""
    command = ["train.py", "--config", str(config), *flags]
    return launch(command, devices, processes)


def launch(command: Sequence[str], devices: int, processes: int) -> list[subprocess.Popen]:
    """Starts a program of this checkout in several processes.

    Args:
        command: the program and its flags, without those of a job of several processes.
        devices: simulated devices of each process.
        processes: how many.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "NPROC": "16",
        # The last one of several flags with the same name counts.
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={devices}",
    }
    program, *flags = command
    job = ["--coordinator", f"localhost:{port}", "--num_processes", str(processes)]
    return [
        subprocess.Popen(
            [sys.executable, ROOT / program, *flags, *job, "--process_id", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]


def finish(
    processes: Sequence[subprocess.Popen], timeout: float = PATIENCE
) -> tuple[list[int], list[str]]:
    """Returns exit statuses and outputs; processes that hang are killed."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()  # a hung one ignores SIGTERM
    return [process.returncode for process in processes], outputs


def write_config(config, folder: Path) -> Path:
    """Writes a file for `train.py --config`."""
    from internvlx_jax.core.overrides import to_dict

    file = folder / f"{Path(config.output_dir).name}.py"
    file.write_text(CONFIG)
    file.with_suffix(".json").write_text(json.dumps(to_dict(config)))
    return file


def logged(run: Path) -> list[dict]:
    """Returns the finished lines of metrics.jsonl."""
    from internvlx_jax.core.json_text import complete_lines
    from internvlx_jax.core.line_log import read_whole

    return [json.loads(line) for line in complete_lines(read_whole(run / "metrics.jsonl"))]


def starts(run: Path) -> int:
    """Returns how often the loop of a run has begun."""
    return len(_start_lines(run))


def _start_lines(run: Path) -> list[bytes]:
    from internvlx_jax.core.json_text import complete_lines
    from internvlx_jax.core.line_log import read_whole

    return complete_lines(read_whole(run / "starts.jsonl"))


def kill_at(
    run: Path, kill: Kill, processes: Sequence[subprocess.Popen], generator: random.Random
) -> dict:
    """Waits for the moment, kills all processes, and returns what was on disk then."""
    from internvlx_jax.checkpoints.run_format import finished_steps
    from internvlx_jax.core.paths import is_remote

    end = time.monotonic() + PATIENCE
    starts_before = starts(run)

    def reached() -> bool:
        if kill.kind == "save":
            names = [path.name for path in _steps(run)]
            names = [name for name in names if name.startswith(str(kill.step))]
            return str(kill.step) in names or any(
                name.startswith(f"{kill.step}.") for name in names
            )
        # A start drops the metrics of the steps that it runs again, and then counts itself.
        return (
            starts(run) > starts_before
            and (rows := logged(run)) != []
            and rows[-1]["step"] >= kill.step
        )

    if kill.kind == "start":
        time.sleep(generator.uniform(1, 12))
    else:
        while not reached():
            if time.monotonic() > end or any(process.poll() is not None for process in processes):
                raise RuntimeError(
                    f"{kill} did not come:\n" + "\n".join(finish(processes, timeout=1)[1])
                )
            time.sleep(0.0005 if kill.kind == "save" else 0.01)
        time.sleep(generator.uniform(0, 0.005 if kill.kind == "save" else 0.2))
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()
    rows = logged(run)
    return {
        "kind": kill.kind,
        "wanted": kill.step,
        "logged": rows[-1]["step"] if rows else 0,
        "inside_a_save": (
            len(finished_steps(run)) < len(_steps(run))
            if is_remote(run)
            else any((run / "checkpoints").glob(UNFINISHED))
        ),
        "saved": max(finished_steps(run), default=0),
    }


def _steps(run: Path) -> list[Path]:
    """Returns the folders of steps, unfinished ones included."""
    try:
        return [path for path in (run / "checkpoints").iterdir() if path.name[0].isdigit()]
    except FileNotFoundError:
        return []


def content(run: Path, step: int) -> dict[str, dict]:
    """Loads everything in a checkpoint, by item and path, on one device."""
    import jax
    import orbax.checkpoint.experimental.v1 as ocp

    from internvlx_jax.core.uploads import local_folder

    path = run / "checkpoints" / str(step)
    if str(path).startswith("s3://"):
        path = local_folder(path)
    path = str(path)  # orbax has its own paths of objects
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    shapes = ocp.checkpointables_metadata(path).metadata
    wanted = {
        item: {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name, leaf in shapes[item].items()
        }
        for item in ("params", "opt_state")
    }
    return ocp.load_checkpointables(path, wanted)


def differences(one: Path, other: Path, step: int) -> list[str]:
    """Returns paths of arrays that differ in a bit, and steps whose metrics differ."""
    import numpy as np

    first, second = content(one, step), content(other, step)
    found = [
        f"{item} {path}"
        for item in first
        for path in first[item]
        if np.asarray(first[item][path]).tobytes() != np.asarray(second[item][path]).tobytes()
    ]
    rows = [[tuple(row.get(name) for name in SAME) for row in logged(run)] for run in (one, other)]
    found += [f"metrics of step {a[0]}" for a, b in zip(*rows) if a != b]
    return found + (["number of metrics"] if len(rows[0]) != len(rows[1]) else [])


def run_and_kill(
    config,
    folder: Path,
    kills: Sequence[Kill],
    generator: random.Random,
    devices: int,
    undisturbed: Path,
    processes: int = 2,
) -> dict:
    """Runs `config` through all kills to its end, and compares it with the run `undisturbed`."""
    from internvlx_jax.checkpoints.run_format import finished_steps
    from internvlx_jax.core.paths import as_path

    run, file = as_path(config.output_dir), write_config(config, folder)
    happened = []
    for kill in kills:
        begun = start(file, devices, processes=processes)
        happened.append(kill_at(run, kill, begun, generator))
        print(json.dumps(happened[-1]), flush=True)
    codes, outputs = finish(start(file, devices, processes=processes))
    if any(codes):
        raise RuntimeError("\n".join(outputs))
    steps = [path.name for path in _steps(run)]
    return {
        "kills": happened,
        "inside_a_save": sum(kill["inside_a_save"] for kill in happened),
        "starts": starts(run),
        "begun_at": [json.loads(line)["step"] for line in _start_lines(run)],
        "differences": differences(undisturbed, run, config.steps),
        "leftovers": sorted({*steps} - {str(step) for step in finished_steps(run)}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/kill"), help="is emptied before (%(default)s)"
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=2)
    parser.add_argument("--faults", action="store_true", help="in a bucket that has faults")
    parser.add_argument("--stage", action="store_true", help="by way of a local folder")
    args = parser.parse_args()
    folder = args.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    config = tiny_config(folder, args.steps, args.save_every)
    devices = 8 // args.processes
    straight = start(write_config(config, folder), devices, processes=args.processes)
    codes, outputs = finish(straight)
    if any(codes):
        print("\n".join(outputs), file=sys.stderr)
        return 1
    generator = random.Random(args.seed)
    kills = plan_kills(args.kills, args.steps, args.save_every, generator)
    with bucket_with_faults() if args.faults else contextlib.nullcontext() as bucket:
        killed = dataclasses.replace(
            config,
            output_dir=f"{bucket or folder}/killed",
            local_checkpoint_dir=str(folder / "stage") if args.stage else None,
        )
        undisturbed = folder / "straight"
        result = run_and_kill(
            killed, folder, kills, generator, devices, undisturbed, args.processes
        )
    result["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(result, indent=2))
    partial = {*result["begun_at"]} - {0, *(kill["saved"] for kill in result["kills"])}
    bad = result["differences"] or result["leftovers"] or partial
    return 1 if bad or result["inside_a_save"] < args.kills // 5 else 0


@contextlib.contextmanager
def bucket_with_faults():
    """Gives a bucket of a server that has faults; counts them to stdout at the end."""
    sys.path.insert(0, str(ROOT / "tests"))
    from object_stores import FAULTS, running_gcs

    with running_gcs() as server:
        os.environ.update(server.environment)
        server.faults(**FAULTS)
        yield "gs://bucket"
        print(json.dumps(server.faults()), flush=True)


def tiny_config(folder: Path, steps: int, save_every: int):
    """Returns a run that compiles in seconds: a two-layer decoder on texts that copy and count."""
    from internvlx_jax.core.data_config import DataConfig
    from internvlx_jax.core.model_config import (
        DecoderConfig,
        ModelConfig,
        PromptConfig,
        VisionConfig,
    )
    from internvlx_jax.core.run_config import (
        ComputeConfig,
        FreezeConfig,
        MeshConfig,
        OptimizerConfig,
        TrainConfig,
    )
    from internvlx_jax.core.tile_config import TileConfig
    from internvlx_jax.data.synthetic import TOKENIZER_FOLDER, text_samples

    lines = [
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
        for question, answer in text_samples()
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = folder / "meta.json"
    meta.write_text(
        json.dumps({"texts": {"root": str(folder), "annotation": str(folder / "texts.jsonl")}})
    )
    model = ModelConfig(
        vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=32, image_size=56),
        decoder=DecoderConfig(
            vocab_size=656, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
    )
    return TrainConfig(
        output_dir=str(folder / "straight"),
        model=model,
        freeze=FreezeConfig(vit=True, projector=True),
        data=DataConfig(
            meta=str(meta),
            tokenizer=str(TOKENIZER_FOLDER),
            max_length=128,
            tokens_per_step=1024,
            max_executables=1,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        compute=ComputeConfig(dtype="float32", remat="none"),
        mesh=MeshConfig(data=4, fsdp=2),
        steps=steps,
        log_every=1,
        eval_every=10**6,
        save_every=save_every,
    )


if __name__ == "__main__":
    sys.exit(main())
