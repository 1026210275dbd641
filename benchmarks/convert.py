"""Converts at real size, both ways: random weights with the exact names and shapes.

Prints time and peak memory of each step.

    python benchmarks/convert.py --size 8b --work DIR

DIR needs room for twice the weights (8b: 17.2 GB each); all of it is deleted at the end. Each step
is a process of its own, whose largest resident set the operating system reports. What comes back is
compared with what was made by the SHA-256 of each tensor's bytes and of each file, and the
parameters with it, bit for bit.
"""

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from internvlx_jax.checkpoints.safetensors_folder import CHECKSUMS, SafetensorsFolder
from internvlx_jax.checkpoints.safetensors_writer import SafetensorsWriter

ROOT = Path(__file__).parents[1]


def make(folder: Path, size: str) -> dict[str, str]:
    """Writes a checkpoint of random bfloat16 values in (-2, 2).

    Returns:
        Name -> SHA-256 of every tensor, in file order.
    """
    stored = json.loads((ROOT / "tests" / "golden" / f"shapes-{size}.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(stored["config"]))
    dtype = np.dtype(ml_dtypes.bfloat16)
    plan = {name: (tuple(shape), dtype) for name, shape in stored["shapes"].items()}
    writer, rng, sums = SafetensorsWriter(folder, plan), np.random.default_rng(0), {}
    for name, (shape, _) in plan.items():
        bits = rng.integers(0, 2**16, shape, dtype=np.uint16)
        bits &= 0xBFFF  # the highest exponent bit is 0: every value is finite
        writer.write(name, bits.view(dtype))
        sums[name] = digest(bits)
    writer.finish()
    return sums


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of the bytes of an array."""
    return hashlib.sha256(array.view(np.uint8).data).hexdigest()


def timed(*arguments: object) -> tuple[float, float]:
    """Runs a command of the converter.

    Returns:
        Seconds, and the peak resident GB of the largest command so far.
    """
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "internvlx_jax.convert", *map(str, arguments)], check=True, cwd=ROOT
    )
    return time.perf_counter() - started, resource.getrusage(
        resource.RUSAGE_CHILDREN
    ).ru_maxrss * 1024 / 1e9


def main() -> int:
    """Runs the command.

    Returns:
        Exit status, 1 if anything that came back differs.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("2b", "8b"), default="8b")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the files; must not exist"
    )
    parser.add_argument(
        "--verify", action="store_true", help="have both steps read back what they wrote"
    )
    args = parser.parse_args()
    work, verify = args.work.absolute(), ["--verify"] if args.verify else []
    if work.exists():
        parser.error(f"{work} exists already")
    source, imported, back = work / "source", work / "jax", work / "back"

    def report(command: str, *arguments: object) -> None:
        seconds, peak = timed(command, *arguments)
        print(
            f"{command}: {seconds:.0f} s, {nbytes / 1e9 / seconds:.2f} GB/s, "
            f"peak resident {peak:.2f} GB",
            flush=True,
        )

    try:
        sums = make(source, args.size)
        nbytes, files = SafetensorsFolder(source).nbytes(), (source / CHECKSUMS).read_text()
        print(f"{args.size}: {nbytes / 1e9:.1f} GB of bfloat16", flush=True)
        report("import", "--from", source, "--to", imported, *verify)
        shutil.rmtree(source)  # its checksums are kept
        report("export", "--from", imported, "--to", back, "--layout", "internvl-x", *verify)
        written = SafetensorsFolder(back)
        same = [digest(written.read(name)) == expected for name, expected in sums.items()]
        equal = set(written.names()) == sums.keys() and (back / CHECKSUMS).read_text() == files
        print(
            f"{sum(same)} of {len(same)} tensors and "
            f"{files.count(chr(10)) if equal else 'not all'} files byte-equal to what was made",
            flush=True,
        )
        report("verify", "--checkpoint", imported, "--against", back)  # JAX -> PyTorch -> JAX
        return 0 if all(same) and equal else 1
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
