"""`load_pretrained`: a checkpoint of either kind -> a model on a mesh (spec: checkpoints.md, training.md 10)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.transfer import transfer
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.models.sharding import activation_shardings, make_mesh


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
        tokenizer: None when the folder holds no tokenizer files.
        report: a line for everything that was not simply read; empty unless another LVTC was asked for.
    """

    model: InternVLX
    config: ModelConfig
    tokenizer: Tokenizer | None
    report: tuple[str, ...] = ()


def load_pretrained(
    path: str | Path,
    *,
    dtype: DTypeLike = "bfloat16",
    mesh: Mesh | None = None,
    lvtc: LvtcConfig | None = None,
    ema: bool = False,
) -> Pretrained:
    """Read a Hugging Face folder or one of our run folders, straight into sharded arrays. torch is not needed.

    Args:
        path: a folder with config.json and safetensors; or a run folder of train.py, or one step inside it.
        dtype: of parameters and activations.
        mesh: devices to place the parameters on; one device if None.
        lvtc: in place of the checkpoint's own; None keeps that. What the checkpoint lacks is initialised with seed 0,
            see `Pretrained.report`.
        ema: of a run folder, the average of the trained parameters in their place.

    Raises:
        FileNotFoundError: no checkpoint there.
        ConfigError: config.json asks for something that is not computed here; a run kept no average.
        CheckpointError: one report of every unused, missing or mismatched tensor.
    """
    source = open_checkpoint(path, ema=ema)
    config = source.config if lvtc is None else dataclasses.replace(source.config, lvtc=lvtc)
    abstract = abstract_model(
        config,
        dtype=dtype,
        param_dtype=dtype,
        shardings=None if mesh is None else activation_shardings(mesh),
    )
    mesh = mesh or make_mesh(MeshConfig(), devices=jax.devices()[:1])
    transferred = transfer(source, config, abstract, mesh, seed=0)
    model = nnx.merge(abstract.graphdef, unflatten(transferred.params))
    return Pretrained(model, config, source.tokenizer(), transferred.report)
