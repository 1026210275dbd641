"""Fine-tunes a checkpoint on your own data.

    python examples/finetune.py CHECKPOINT DATA.jsonl OUT

Each line of DATA.jsonl is a conversation, and image paths are relative to its folder:

    {"image": "page.png", "conversations": [{"from": "human", "value": "<image>\\nTotal?"},
                                            {"from": "gpt", "value": "12.50"}]}

The same command resumes a run that was stopped.
"""

import json
import sys
from pathlib import Path

from internvlx_jax.core.data_config import DataConfig
from internvlx_jax.core.run_config import ComputeConfig, FreezeConfig, OptimizerConfig, TrainConfig
from internvlx_jax.training.loop import train


def main(checkpoint: str, annotations: str, out: str, *, steps: int = 200, rows: int = 8) -> dict:
    """Trains projector and decoder, the tower frozen; returns the last metrics.

    Args:
        checkpoint: Run folder or Hugging Face folder to start from.
        annotations: JSONL file of conversations.
        out: Folder of the run; `OUT/checkpoints` receives the result.
        steps: Optimizer updates.
        rows: Samples per step, a multiple of the number of devices.
    """
    source, folder = Path(annotations).absolute(), Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    meta = folder / "meta.json"
    entry = {"root": str(source.parent), "annotation": str(source)}
    meta.write_text(json.dumps({source.stem: entry}), encoding="utf-8")
    config = TrainConfig(
        output_dir=str(folder / "run"),
        init_from=checkpoint,
        data=DataConfig(meta=str(meta), batch_mode="samples", samples_per_step=rows),
        optimizer=OptimizerConfig(learning_rate=4e-5, warmup_ratio=0.03),
        compute=ComputeConfig(dtype="float32", remat="none"),  # bfloat16 and full on accelerators
        freeze=FreezeConfig(vit=True),
        steps=steps,
    )
    return train(config)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
