"""Loads a checkpoint of any kind into a model on a mesh (design: checkpoints.md 1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.opening import open_checkpoint
from internvlx_jax.checkpoints.transfer import transfer
from internvlx_jax.core.model_config import LvtcConfig, ModelConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.compile_cache import keep_compiled
from internvlx_jax.models.internvlx import InternVLX
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.models.sharding import activation_shardings, make_mesh


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
        model: the model with its parameters.
        config: its architecture and prompt.
        tokenizer: its tokenizer; None when the checkpoint has no tokenizer files.
        report: a line for everything that was not simply read; empty unless another LVTC was
            requested.
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
    """Reads a checkpoint straight into sharded arrays, without torch.

    Args:
        path: a Hugging Face folder with config.json and its weights, a run folder of train.py or
            one step inside it, or a hub id.
        dtype: dtype of parameters and activations.
        mesh: devices for the parameters; None takes one device.
        lvtc: replaces the LVTC of the checkpoint; None keeps it. Parameters that the checkpoint
            lacks are initialized with seed 0 and listed in `Pretrained.report`.
        ema: reads a run's average of its trained parameters instead of them.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ConfigError: config.json needs something that this package does not compute, or the run
            kept no average.
        CheckpointError: one report of every unused, missing or mismatched tensor.
    """
    return load_opened(open_checkpoint(path, ema=ema), dtype=dtype, mesh=mesh, lvtc=lvtc)


def load_opened(
    source: Checkpoint,
    *,
    dtype: DTypeLike = "bfloat16",
    mesh: Mesh | None = None,
    lvtc: LvtcConfig | None = None,
) -> Pretrained:
    """Reads an open checkpoint; arguments, result and errors are those of `load_pretrained`."""
    keep_compiled()
    config = source.config if lvtc is None else dataclasses.replace(source.config, lvtc=lvtc)
    abstract = abstract_model(
        config,
        dtype=dtype,
        param_dtype=dtype,
        shardings=None if mesh is None else activation_shardings(mesh),
    )
    transferred = transfer(source, config, abstract, mesh or one_device(), seed=0)
    model = nnx.merge(abstract.graphdef, unflatten(transferred.params))
    tokenizer = Tokenizer.find(source.tokenizer_folder)
    return Pretrained(model, config, tokenizer, transferred.report)


def one_device() -> Mesh:
    """Returns the mesh of the first device alone."""
    return make_mesh(MeshConfig(), devices=jax.devices()[:1])
