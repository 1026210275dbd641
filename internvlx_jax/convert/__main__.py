"""`python -m internvlx_jax.convert verify`: prove that a checkpoint computes what it should."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from internvlx_jax.convert.load import load_pretrained
from internvlx_jax.convert.verify import InputsError, compare, compute_outputs, format_table, save_npz
from internvlx_jax.errors import CheckpointError, ConfigError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvlx_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="run a checkpoint in float32 on stored arrays")
    verify.add_argument("--checkpoint", type=Path, required=True, help="Hugging Face folder or run folder")
    verify.add_argument("--inputs", type=Path, required=True, help="npz, named as tests/golden/*/inputs.npz")
    verify.add_argument("--out", type=Path, required=True, help="npz to write")
    verify.add_argument("--image_token_id", type=int, required=True, help="id of the image placeholder token")
    verify.add_argument("--reference", type=Path, help="npz of expected outputs; exit status 1 if they differ")
    verify.add_argument("--atol", type=float, default=1e-4)
    return run_verify(parser.parse_args(argv))


def run_verify(args: argparse.Namespace) -> int:
    try:
        arrays = _load_npz(args.inputs)
        reference = _load_npz(args.reference) if args.reference else None
        model = load_pretrained(args.checkpoint, dtype="float32").model
        outputs = compute_outputs(model, arrays, args.image_token_id)
    except (OSError, ConfigError, CheckpointError, InputsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save_npz(args.out, outputs)
    print(f"wrote {len(outputs)} arrays to {args.out}")
    if reference is None:
        return 0
    rows = compare(outputs, reference, arrays)
    if not rows:
        print(f"error: {args.reference} holds none of {', '.join(outputs)}", file=sys.stderr)
        return 2
    print(format_table(rows, args.atol))
    return 0 if all(row.passes(args.atol) for row in rows) else 1


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: not a readable npz file ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
