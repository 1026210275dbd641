"""Converts PyTorch checkpoints to JAX and back, and proves that they agree.

import     a PyTorch folder (or ViT and LLM folders) -> a JAX checkpoint for train.py and eval.py
export     a JAX checkpoint -> a folder that PyTorch loads
inspect    what a folder is, and what it lacks
verify     run a checkpoint on stored arrays, or compare two checkpoints

Exit status: 0 done, 1 the checkpoint or the request cannot be used (nothing is written), or a
comparison fails, 2 wrong flags, or verify cannot run.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from internvlx_jax.checkpoints.hf_folder import HFFolder
from internvlx_jax.checkpoints.opening import open_checkpoint, resolve
from internvlx_jax.checkpoints.torch_checkpoint import Allowed
from internvlx_jax.cli.console import CommandParser, run_command
from internvlx_jax.convert.conversion_report import Report
from internvlx_jax.convert.export_hf import export_checkpoint
from internvlx_jax.convert.import_hf import import_checkpoint
from internvlx_jax.convert.inspection import inspect
from internvlx_jax.convert.model_parts import Parts
from internvlx_jax.convert.part_sources import FRESH_TOWERS
from internvlx_jax.convert.verify import (
    InputsError,
    compare,
    compare_checkpoints,
    compute_outputs,
    format_table,
    save_npz,
)
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import write_json
from internvlx_jax.core.paths import as_path
from internvlx_jax.core.ranges import NUMBER, SEED, real_number, whole_number
from internvlx_jax.core.uploads import local_folder
from internvlx_jax.inference.loading import load_pretrained


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        prog="internvlx convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _import_flags(commands.add_parser("import", help="PyTorch -> JAX"))
    _export_flags(commands.add_parser("export", help="JAX -> PyTorch"))
    flags = commands.add_parser(
        "inspect", help="what a folder is, and what it lacks; exit status 1 if it lacks anything"
    )
    flags.add_argument("folder", help="folder of any kind, or Hugging Face id")
    flags.add_argument("--json", action="store_true", help="print JSON")
    _verify_flags(
        commands.add_parser(
            "verify", help="run a checkpoint in float32 on stored arrays, or compare two"
        )
    )
    args = parser.parse_args(
        [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    )
    if args.command == "verify" and args.against is None:
        return run_verify(parser, args)
    # Conversion is work for the host, whatever accelerators are attached.
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        # Large parameters are written in eight parts (write_params).
        jax.config.update("jax_num_cpu_devices", 8)
    command = {
        "import": run_import,
        "export": run_export,
        "inspect": run_inspect,
        "verify": run_comparison,
    }[args.command]
    failed = 2 if args.command == "verify" else 1
    return run_command(lambda: command(parser, args), failed=failed)


def _underscored(word: str) -> str:
    """Returns a flag with underscores: it may be spelled with dashes, too, as in --drop-lvtc."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def _import_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("--from", dest="source", help="checkpoint folder or Hugging Face id")
    flags.add_argument("--revision", help="branch, tag or commit of a Hugging Face id")
    flags.add_argument(
        "--vit",
        help="build from parts: folder of the tower, or fresh: InternViT-300M at random weights "
        "(fresh-tiny: two narrow layers)",
    )
    flags.add_argument("--llm", help="build from parts: folder of the decoder, or a GGUF file")
    flags.add_argument(
        "--projector",
        help="build from parts: folder or file; without it, it starts fresh",
    )
    flags.add_argument(
        "--projector_kind",
        choices=("pvtc", "mlp1"),
        default="pvtc",
        help="kind of a fresh projector",
    )
    flags.add_argument(
        "--mean_input_rows",
        action="store_true",
        help="new tokens: input rows start as the mean of the others, too",
    )
    flags.add_argument("--to", required=True, help="new folder")
    flags.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16"),
        default="keep",
        help="dtype of the stored weights",
    )
    flags.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        dest="fields",
        help="replace or complete fields of config.json, e.g. template=internvl2_5",
    )
    flags.add_argument(
        "--image_size", type=int, help="resize the position table to tiles of this side"
    )
    flags.add_argument("--lora", nargs="+", default=[], help="LoRA folders of peft, one part each")
    flags.add_argument(
        "--keep_lora", action="store_true", help="store adapters beside the weights, not merged"
    )
    flags.add_argument(
        "--ignore_source",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="tensors that are not needed",
    )
    flags.add_argument(
        "--init_missing",
        nargs="+",
        default=[],
        metavar="REGEX",
        help="parameters (dotted paths) that start fresh where the checkpoint lacks them",
    )
    flags.add_argument(
        "--seed", type=whole_number(SEED), default=0, help="seed of what starts fresh"
    )
    flags.add_argument("--verify", action="store_true", help="read back and compare bit for bit")
    flags.add_argument("--report", help="write the report as JSON, too")


def _export_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--from",
        dest="source",
        required=True,
        help="run folder, RUN/checkpoints/STEP, imported folder, PyTorch folder or Hugging Face id "
        "(to change its layout)",
    )
    flags.add_argument("--to", required=True, help="new folder")
    flags.add_argument(
        "--layout",
        required=True,
        choices=("internvl-x", "internvl", "hf", "vit", "projector", "peft"),
    )
    flags.add_argument("--dtype", choices=("keep", "float32", "bfloat16"), default="bfloat16")
    flags.add_argument(
        "--image_token_id", type=int, help="for the hf config, where no tokenizer says it"
    )
    flags.add_argument(
        "--ema", action="store_true", help="take the average of the parameters of a run"
    )
    flags.add_argument("--drop_lvtc", action="store_true", help="leave LVTC's parameters out")
    flags.add_argument("--verify", action="store_true", help="read back and compare bit for bit")
    flags.add_argument("--report", help="write the report as JSON, too")


def _verify_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--checkpoint", required=True, help="Hugging Face folder or id, or run folder"
    )
    flags.add_argument("--against", help="another checkpoint: compare all parameters bit for bit")
    flags.add_argument("--inputs", help="npz, named as tests/golden/*/inputs.npz")
    flags.add_argument("--out", help="npz to write")
    flags.add_argument("--image_token_id", type=int, help="id of the image placeholder token")
    flags.add_argument("--reference", help="npz of expected outputs; exit status 1 if they differ")
    flags.add_argument("--atol", type=real_number(NUMBER), default=1e-4)


def run_import(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    if (args.source is None) == (args.vit is None) or (args.vit is None) != (args.llm is None):
        parser.error("give --from, or --vit and --llm")
    fields = _fields(parser, args.fields)
    allowed = Allowed(
        ignore_source=tuple(args.ignore_source),
        init_missing=tuple(args.init_missing),
        seed=args.seed,
    )
    kept = ()
    if args.source is not None:
        source = HFFolder(
            resolve(args.source, args.revision, by_range=True),
            fields=fields,
            image_size=args.image_size,
            adapters=[local_folder(each) for each in args.lora],
            keep_lora=args.keep_lora,
            allowed=allowed,
        )
        kept = source.kept
        if args.keep_lora and not kept:
            raise ConfigError(
                f"--keep_lora: {args.source} holds no adapters, and --lora gives none"
            )
    else:
        if args.lora or args.keep_lora:
            parser.error("--lora and --keep_lora go with --from")
        source = Parts(
            args.vit if args.vit in FRESH_TOWERS else resolve(args.vit),
            resolve(args.llm),
            None if args.projector is None else local_folder(args.projector),
            kind=args.projector_kind,
            fields=fields,
            image_size=args.image_size,
            mean_input_rows=args.mean_input_rows,
            allowed=allowed,
        )
    out = as_path(args.to)
    report = import_checkpoint(source, out, dtype=args.dtype, verify=args.verify, kept=kept)
    return _finish(report, args)


def run_export(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    report = export_checkpoint(
        open_checkpoint(args.source, ema=args.ema),
        as_path(args.to),
        layout=args.layout,
        dtype=args.dtype,
        verify=args.verify,
        image_token_id=args.image_token_id,
        drop_lvtc=args.drop_lvtc,
    )
    return _finish(report, args)


def run_inspect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    found = inspect(resolve(args.folder))
    print(json.dumps(found.to_json(), indent=2) if args.json else found.text())
    return 1 if found.problems else 0


def _finish(report: Report, args: argparse.Namespace) -> int:
    print(f"{args.to}: {report.text()}")
    if args.report:
        write_json(as_path(args.report), report.to_json())
    return 0


def _fields(parser: argparse.ArgumentParser, settings: list[str]) -> dict[str, Any]:
    """Parses NAME=VALUE settings; a value is a Python literal, true, false, null, or text."""
    fields = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            parser.error(f"--field {setting}: expected NAME=VALUE")
        try:
            value = ast.literal_eval(
                {"true": "True", "false": "False", "null": "None"}.get(text, text)
            )
        except (SyntaxError, ValueError):
            value = text
        fields[name] = value
    return fields


def run_verify(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    try:
        if None in (args.inputs, args.out, args.image_token_id):
            parser.error("verify needs --against, or --inputs, --out and --image_token_id")
        arrays = _load_npz(local_folder(args.inputs))
        reference = _load_npz(local_folder(args.reference)) if args.reference else None
        model = load_pretrained(args.checkpoint, dtype="float32").model
        outputs = compute_outputs(model, arrays, args.image_token_id)
    except (OSError, ConfigError, CheckpointError, InputsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    save_npz(as_path(args.out), outputs)
    print(f"wrote {len(outputs)} arrays to {args.out}")
    if reference is None:
        return 0
    rows = compare(outputs, reference, arrays)
    if not rows:
        print(f"error: {args.reference} holds none of {', '.join(outputs)}", file=sys.stderr)
        return 2
    print(format_table(rows, args.atol))
    return 0 if all(row.passes(args.atol) for row in rows) else 1


def run_comparison(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    equal, problems = compare_checkpoints(
        open_checkpoint(args.checkpoint), open_checkpoint(args.against)
    )
    print("\n".join(f"  {problem}" for problem in problems) or f"{equal} parameters, all bit-equal")
    return 1 if problems else 0


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise OSError(f"{path}: not a readable npz file ({error})") from error
