"""One of several processes that train together: `python process.py RANK COUNT PORT CONFIG.json [STOP_AFTER]`."""

import json
import sys

import jax

from internvlx_jax.config import from_dict
from internvlx_jax.training.config import TrainConfig
from internvlx_jax.training.loop import train

if __name__ == "__main__":
    rank, count, port, config, *stop_after = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
    with open(config) as file:
        config = from_dict(TrainConfig, json.load(file))
    train(config, stop_after=int(stop_after[0]) if stop_after else None)
