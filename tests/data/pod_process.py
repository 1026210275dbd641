"""One of several processes that read the same run.

    python pod_process.py RANK COUNT PORT META FOLDER STEPS

Both modes take a step in turn. At each one a jitted reduction over the global batch runs, which
hangs or fails unless all processes have the same bucket. FOLDER gets a line per step and, from time
to time, the position of both loaders.
"""

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from internvlx_jax.core.data_config import DataConfig, FaultConfig
from internvlx_jax.core.files import write_json
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer

ROW_QUANTUM = 4
SAVE_EVERY = 25


def make_loaders(meta: str, states: dict, index: int, count: int, **settings) -> dict[str, Loader]:
    processor = Processor(
        Tokenizer.load(TOKENIZER_FOLDER),
        get_template("internlm2-chat"),
        "",
        TileConfig(tile_size=28, max_num=4),
        4,
    )
    config = DataConfig(
        meta=meta,
        mixture="weight",
        max_length=128,
        tokens_per_step=256,
        max_executables=4,
        loss_reduction="square",
        faults=FaultConfig(max_share=0.3),
        **settings,
    )
    return {
        mode: Loader(
            meta,
            dataclasses.replace(config, batch_mode=mode),
            processor,
            row_quantum=ROW_QUANTUM,
            seed=3,
            process_index=index,
            process_count=count,
            state=states.get(mode),
        )
        for mode in ("tokens", "pack")
    }


def rows_digest(batch, rows: slice) -> str:
    sha = hashlib.sha256()
    for array in (*batch.inputs, batch.labels, batch.loss_weight):
        if array is not None:  # there is no short layout without LVTC
            sha.update(np.ascontiguousarray(array[rows]).tobytes())
    return sha.hexdigest()[:16]


def main() -> None:
    rank, count, port, meta, folder, steps = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
    folder, steps = Path(folder), int(steps)
    saved = folder / "state.json"
    states = json.loads(saved.read_text()) if saved.exists() else {}
    loaders = make_loaders(meta, states, jax.process_index(), jax.process_count())
    first = states["tokens"]["step"] if states else 0
    streams = {mode: loader.steps(first, steps) for mode, loader in loaders.items()}
    sharding = NamedSharding(Mesh(jax.devices(), ("data",)), PartitionSpec("data"))
    total = jax.jit(jnp.sum)
    with open(folder / f"steps-{rank}.jsonl", "a") as log:
        for step in range(first, steps):
            if step % SAVE_EVERY == 0 and rank == "0":
                write_json(saved, {mode: loader.state(step) for mode, loader in loaders.items()})
            for mode, stream in streams.items():
                batch = next(stream).batch
                tokens = jax.make_array_from_process_local_data(sharding, batch.inputs.tokens)
                line = {
                    "step": step,
                    "mode": mode,
                    "shape": [*tokens.shape, batch.inputs.tiles.shape[1]],
                    "sum": int(total(tokens)),
                    "rows": rows_digest(batch, slice(None)),
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
    write_json(
        folder / f"faults-{rank}.json",
        {mode: loader.faults.totals().tolist() for mode, loader in loaders.items()},
    )


if __name__ == "__main__":
    main()
