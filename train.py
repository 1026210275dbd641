"""Train a model: `python train.py --config configs/NAME.py --set optimizer.learning_rate=1e-4`.

The same command resumes a run that was stopped.
"""

import argparse
import sys

from internvlx_jax.config import load_config_file, override
from internvlx_jax.data.errors import SampleError
from internvlx_jax.errors import CheckpointError, ConfigError
from internvlx_jax.training.loop import train


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a file of configs/")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", dest="settings",
                        help="override fields, e.g. data.max_length=2048 mesh.fsdp=8")
    parser.add_argument("--stop_after", type=int, help="stop after this many steps, with a checkpoint to resume from")
    args = parser.parse_args()
    try:
        train(override(load_config_file(args.config), args.settings), stop_after=args.stop_after)
    except (ConfigError, CheckpointError, SampleError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
