"""`convert import`: a PyTorch checkpoint becomes a run folder (design: checkpoints.md 8, 10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from internvlx_jax.checkpoints.adapters import Lora
from internvlx_jax.checkpoints.name_entries import Entry
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.run_writer import write_params
from internvlx_jax.checkpoints.side_files import copy_tokenizer
from internvlx_jax.checkpoints.tensors import NUMPY_DTYPES, Dtype, difference
from internvlx_jax.checkpoints.torch_checkpoint import TorchCheckpoint
from internvlx_jax.convert.conversion_report import Report
from internvlx_jax.core.disk import check_space
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import new_folder, write_json
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.paths import is_remote
from internvlx_jax.core.uploads import MARKER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.data.tokenizer_files import has_tokenizer
from internvlx_jax.models.params import AbstractModel, abstract_model, init_params


def import_checkpoint(
    source: TorchCheckpoint,
    out: Path,
    *,
    dtype: Dtype = "keep",
    verify: bool = False,
    kept: tuple[Lora, ...] = (),
) -> Report:
    """Writes a checkpoint to a new folder that train.py, eval.py and load_pretrained take.

    One parameter is in memory at a time, besides those that start fresh. The folder appears once
    all of it is right.

    Args:
        source: the opened checkpoint.
        out: the new folder.
        dtype: dtype of the stored parameters; `keep` is the source's.
        verify: read back what was written, and compare every tensor with the source bit for bit.
        kept: adapters to store beside the weights instead of merging them.

    Raises:
        FileExistsError: `out` exists already.
        CheckpointError: lists everything that does not fit.
    """
    abstract = abstract_model(source.config, dtype="float32")
    fresh = source.check(abstract)
    report = Report(
        "import", source.config, source.layout, notes=[*source.notes, *source.check_sums()]
    )
    metadata = {"model": to_dict(source.config), "lora": [to_dict(lora.config) for lora in kept]}
    check_space(out, _nbytes(source, abstract, fresh, dtype), "the checkpoint")
    with new_folder(out) as folder:
        params = _params(source, abstract, fresh, dtype, report, kept)
        write_params(folder.absolute() / "checkpoints" / "0", metadata, params)
        if is_remote(out):  # there the marker makes a step complete, not its name
            (folder / "checkpoints" / "0" / MARKER).write_text("")
        report.rounded = {path: count for path, count in source.rounded.items() if count}
        report.merged = [adapter.base.target for lora in source.lora for adapter in lora.adapters]
        report.kept = [entry.target for lora in kept for entry in adapter_entries(lora)]
        write_json(folder / "config.json", metadata)
        report.notes += source.write_side_files(folder / "source")
        copy_tokenizer(folder / "source", folder / "tokenizer")
        report.notes += _tokenizer_notes(folder / "tokenizer", source.config)
        if verify:
            paths = sorted(abstract.shapes.keys() - set(fresh))
            report.verified = _compare(source, RunFolder(folder), paths, kept)
    return report


def _nbytes(
    source: TorchCheckpoint, abstract: AbstractModel, fresh: list[str], dtype: Dtype
) -> int:
    """Returns the bytes of the parameters as they will be stored, without compression."""

    def itemsize(path: str) -> int:
        if dtype != "keep":
            return np.dtype(NUMPY_DTYPES[dtype]).itemsize
        return source.dtype("decoder.embedding" if path in fresh else path).itemsize

    return sum(leaf.size * itemsize(path) for path, leaf in abstract.shapes.items())


def _tokenizer_notes(folder: Path, config: ModelConfig) -> list[str]:
    """Says what keeps the tokenizer files that were copied from being used; nothing if they can be.

    The weights are usable all the same, with the tokenizer of another folder.
    """
    if not has_tokenizer(folder):
        return ["no tokenizer files: name their folder where text is needed"]
    try:
        tokenizer = Tokenizer.load(folder)
        tokenizer.check_rows(config.decoder.vocab_size)
        tokenizer.token_id(get_template(config.prompt.template).stop)
    except (ConfigError, FileNotFoundError) as error:
        return [f"the tokenizer files cannot be used as they are: {error}"]
    return []


def _params(
    source: TorchCheckpoint,
    abstract: AbstractModel,
    fresh: list[str],
    dtype: Dtype,
    report: Report,
    kept: tuple[Lora, ...],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the parameters of the model in order, read or fresh, and counts them in the report.

    Raises:
        CheckpointError: some of them are not finite, once all are read.
    """
    seed = source.allowed.seed
    wanted = None if dtype == "keep" else NUMPY_DTYPES[dtype]
    new: dict[str, Any] = {}
    if fresh:
        # Fresh parameters are stored in the dtype that was asked for, or in the embedding's.
        kind = wanted or source.dtype("decoder.embedding")
        new = init_params(source.config, seed, param_dtype=kind, paths=fresh)
    for path, leaf in abstract.shapes.items():
        if path in new:
            array = np.asarray(new.pop(path))
            report.initialized[path] = f"{list(leaf.shape)} ~ {abstract.inits[path]}, seed {seed}"
        else:
            array = source.read(path, wanted)
        report.count(path, array)
        yield path, array
        del array  # or it would stay in memory beside the next one
    for lora in kept:
        for entry in adapter_entries(lora):
            yield entry.target, _stack(lora, entry)
    source.check_finite()


def adapter_entries(lora: Lora) -> list[Entry]:
    """Returns the table entries of all adapters of one part."""
    return [entry for adapter in lora.adapters for pair in adapter.pairs for entry in pair]


def _stack(lora: Lora, entry: Entry) -> np.ndarray:
    return np.stack([lora.read(entry, layer) for layer in range(entry.layers or 1)])


def _compare(
    source: TorchCheckpoint, written: RunFolder, paths: Iterable[str], kept: tuple[Lora, ...]
) -> int:
    """Compares what was written with the source bit for bit; returns how many parameters are equal.

    Raises:
        CheckpointError: describes each parameter that differs.
    """
    problems: list[str] = []
    equal = 0
    for path, found in written.read_all(paths):
        problems += source.differences(path, found)
        equal += 1
        del found  # before the next one is read
    for lora in kept:
        entries = {entry.target: entry for entry in adapter_entries(lora)}
        for path, found in written.read_all(entries):
            problems += difference(path, _stack(lora, entries[path]), np.asarray(found))
            equal += 1
    if problems:
        raise CheckpointError(written.path, problems)
    return equal
