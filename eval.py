"""Score a checkpoint: `python eval.py --checkpoint DIR --data FILE.jsonl --metric exact`.

DIR is a Hugging Face folder or a run folder of train.py. Exit status: 0 done, 1 wrong input, 2 wrong flags, 3 some
samples failed (they count as wrong, and predictions.jsonl says why).
"""

import argparse
import dataclasses
import sys

from internvlx_jax.data.errors import SampleError
from internvlx_jax.errors import CheckpointError, ConfigError
from internvlx_jax.evaluation.job import EvalConfig, run
from internvlx_jax.evaluation.metrics import METRICS
from internvlx_jax.training.sharding import MeshConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", required=True, help="Hugging Face folder, run folder, or RUN/checkpoints/STEP")
    parser.add_argument("--data", required=True, help="questions: JSONL with question, answer, image, question_id")
    parser.add_argument("--metric", required=True, choices=sorted(METRICS))
    parser.add_argument("--out_dir", default="runs/eval", help="receives predictions.jsonl and summary.json")
    parser.add_argument("--image_root", help="folder of the image paths; the folder of --data by default")
    parser.add_argument("--prompt", help="how to ask, with {question} in it")
    parser.add_argument("--tile_rule", choices=("edge", "area", "off"), help="the checkpoint's by default")
    parser.add_argument("--max_num", type=int, help="most tiles an image; the checkpoint's by default")
    parser.add_argument("--dynamic", action=argparse.BooleanOptionalAction, help="cut tiles, or squash to one")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--max_new_tokens", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--limit", type=int, help="only the first questions")
    for axis in dataclasses.fields(MeshConfig):
        parser.add_argument(f"--mesh_{axis.name}", type=int, default=axis.default, help="devices along this mesh axis")
    args = vars(parser.parse_args())
    mesh = MeshConfig(**{axis.name: args.pop(f"mesh_{axis.name}") for axis in dataclasses.fields(MeshConfig)})
    try:
        summary = run(EvalConfig(**args, mesh=mesh))
    except (ConfigError, CheckpointError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{summary['metric']} {summary['score']:.4f} on {summary['samples']} samples, {summary['errors']} errors; "
          f"see {args['out_dir']}")
    return 3 if summary["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
