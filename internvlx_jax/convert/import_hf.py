"""`convert import`: a PyTorch checkpoint -> a run folder of parameters, one parameter at a time (design: checkpoints.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.checkpoints.hf_folder import TorchCheckpoint
from internvlx_jax.checkpoints.lora_files import Lora
from internvlx_jax.checkpoints.name_table import Entry
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_writer import ParamsWriter
from internvlx_jax.checkpoints.side_files import copy_tokenizer
from internvlx_jax.checkpoints.tensors import Dtype, difference
from internvlx_jax.convert.conversion_report import Report
from internvlx_jax.core.errors import CheckpointError
from internvlx_jax.core.files import new_folder, write_json
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.models.params import abstract_model, init_params


def import_checkpoint(
    source: TorchCheckpoint,
    out: Path,
    *,
    dtype: Dtype = "keep",
    verify: bool = False,
    kept: tuple[Lora, ...] = (),
) -> Report:
    """Write `source` to the new folder `out`, which train.py, eval.py and load_pretrained take.

    One parameter is in memory at a time, and those that start fresh. Nothing of `out` exists before all of it is right.

    dtype: of the stored parameters; `keep` is the source's.
    verify: read back what was written, and compare every tensor with the source bit for bit.
    kept: adapters to store beside the weights instead of merging them.

    Raises FileExistsError, and CheckpointError naming everything that does not fit.
    """
    abstract = abstract_model(source.config, dtype="float32")
    fresh = source.check(abstract)
    source.check_sums()
    report = Report("import", source.config, source.layout, notes=list(source.notes))
    metadata = {"model": to_dict(source.config), "lora": [to_dict(lora.config) for lora in kept]}
    with new_folder(out) as folder:
        writer = ParamsWriter(folder.absolute() / "checkpoints" / "0", metadata)
        new: dict[str, Any] = {}
        if fresh:
            kind, seed = _fresh_dtype(source, dtype), source.allowed.seed
            new = init_params(source.config, seed, param_dtype=kind, paths=fresh)
        for path, leaf in abstract.shapes.items():
            if path in fresh:
                array = np.asarray(new.pop(path))
                report.initialised[path] = (
                    f"{list(leaf.shape)} ~ {abstract.inits[path]}, seed {seed}"
                )
            else:
                array = source.read(path, None if dtype == "keep" else np.dtype(dtype))
            report.count(path, array)
            writer.add(path, array)
            del array  # or it would stay in memory beside the next one
        for lora in kept:
            for entry in adapter_entries(lora):
                writer.add(entry.target, _stack(lora, entry))
        source.check_finite()
        writer.finish()
        report.rounded = {path: count for path, count in source.rounded.items() if count}
        report.merged = [adapter.base.target for lora in source.lora for adapter in lora.adapters]
        report.kept = [entry.target for lora in kept for entry in adapter_entries(lora)]
        write_json(folder / "config.json", metadata)
        report.notes += source.write_side_files(folder / "source")
        copy_tokenizer(folder / "source", folder / "tokenizer")
        if verify:
            report.verified = _compare(
                source, RunFolder(folder), set(abstract.shapes) - set(fresh), kept
            )
    return report


def adapter_entries(lora: Lora) -> list[Entry]:
    return [entry for adapter in lora.adapters for pair in adapter.pairs for entry in pair]


def _stack(lora: Lora, entry: Entry) -> np.ndarray:
    return np.stack([lora.read(entry, layer) for layer in range(entry.layers)])


def _fresh_dtype(source: TorchCheckpoint, dtype: Dtype) -> np.dtype:
    """What fresh parameters are stored in: the dtype asked for, or that of the embedding."""
    return source.dtype("decoder.embedding") if dtype == "keep" else np.dtype(dtype)


def _compare(
    source: TorchCheckpoint, written: RunFolder, paths: set[str], kept: tuple[Lora, ...]
) -> int:
    """Raises CheckpointError for each parameter that is not, bit for bit, what the source holds -> how many are."""
    problems = []
    for path, found in written.read_all(sorted(paths)):
        problems += source.differences(path, found)
        del found  # before the next one is read
    for lora in kept:
        entries = {entry.target: entry for entry in adapter_entries(lora)}
        for path, found in written.read_all(entries):
            problems += difference(path, _stack(lora, entries[path]), found)
    if problems:
        raise CheckpointError(written.path, problems)
    return len(paths) + sum(len(adapter_entries(lora)) for lora in kept)
