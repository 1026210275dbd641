"""`convert export`: a checkpoint becomes a folder for PyTorch (design: checkpoints.md 6, 7, 10)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvlx_jax.checkpoints.checkpoint import Checkpoint
from internvlx_jax.checkpoints.hf_config import model_config
from internvlx_jax.checkpoints.hf_config_write import (
    chat_config,
    hf_config,
    say_whether_tied,
    vit_config,
)
from internvlx_jax.checkpoints.hf_processor_write import write_processor
from internvlx_jax.checkpoints.lora_files import write_adapters
from internvlx_jax.checkpoints.name_entries import Entry, tensor_shapes
from internvlx_jax.checkpoints.name_table import LAYOUTS, name_table
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder
from internvlx_jax.checkpoints.safetensors_writer import Plan, SafetensorsWriter
from internvlx_jax.checkpoints.side_files import OTHER_FILES, TOKENIZER_FILES, missing_remote_code
from internvlx_jax.checkpoints.tensors import (
    NUMPY_DTYPES,
    Dtype,
    HostArray,
    changed_by_cast,
    copy_strided,
    count_not_finite,
    difference,
)
from internvlx_jax.convert.conversion_report import Report
from internvlx_jax.core.disk import check_space
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.files import new_folder, write_json
from internvlx_jax.core.model_config import ModelConfig
from internvlx_jax.core.projector_sites import released_site
from internvlx_jax.core.uploads import sent_ahead
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.params import abstract_model

ExportLayout = Literal["internvl-x", "internvl", "hf", "vit", "projector", "peft"]


def export_checkpoint(
    source: Checkpoint,
    out: Path,
    *,
    layout: ExportLayout,
    dtype: Dtype = "bfloat16",
    verify: bool = False,
    image_token_id: int | None = None,
    drop_lvtc: bool = False,
) -> Report:
    """Writes a new folder: weights, index, checksums, config.json, and the source's side files.

    The largest parameter is in memory, and one tensor of it. The folder appears once all of it is
    right. Shards for an object store are sent one by one, so that few of them are on the disk.
    Adapters beside the weights are merged, except in layout `peft`, which holds only them.

    Args:
        source: the opened checkpoint.
        out: the new folder.
        layout: how tensors are named, or which part is written.
        dtype: dtype of the tensors; `keep` is the stored one.
        verify: read back what was written, and compare every tensor with the source bit for bit.
        image_token_id: id for the hf config, where neither source nor tokenizer has it.
        drop_lvtc: leave the parameters of LVTC out.

    Raises:
        ConfigError: the model has no such layout.
        FileExistsError: `out` exists already.
        CheckpointError: the source does not fit its config, or holds values that are not finite.
    """
    config = dataclasses.replace(source.config, lvtc=None) if drop_lvtc else source.config
    if drop_lvtc and (source.config.lvtc is None or released_site(source.config) is None):
        raise ConfigError("--drop_lvtc: the model has no LVTC, or no projector without it")
    source.check(abstract_model(source.config, dtype="float32"))
    report = Report("export", config, layout)
    if layout == "peft":
        with new_folder(out) as folder:
            _write_adapters(source, folder, report, verify)
        return report
    table = _table(config, layout)
    source.check_sums()
    with sent_ahead(out) as send, new_folder(out) as folder:
        weights = _Weights(source, table, dtype)
        nbytes = sum(math.prod(shape) * kind.itemsize for shape, kind in weights.plan.values())
        check_space(out, nbytes, "the checkpoint")
        plan = weights.plan if send is None else weights.plan_as_read()
        writer = SafetensorsWriter(folder, plan, send=send)
        for path, name, rows, piece in weights.pieces(report):
            writer.write(name, piece, rows)
            report.count(path, piece)
        writer.finish()
        report.files = writer.files
        if layout in LAYOUTS:
            fields = _config_fields(source, config, layout, dtype, weights, image_token_id)
            fields = say_whether_tied(fields, config.decoder.tie_embeddings)
            report.notes += _side_files(source, folder, layout, fields)
            if layout == "hf":
                report.notes += write_processor(folder, config)
        elif layout == "vit":
            write_json(folder / "config.json", vit_config(config.vision, dtype=weights.dtype_name))
        if verify:
            written = SafetensorsFolder(folder, files=None if send is None else out)
            report.verified = weights.compare(written)
    return report


def _table(config: ModelConfig, layout: ExportLayout) -> list[Entry]:
    """Returns the name table of a layout, or its part without the prefix."""
    if layout in LAYOUTS:
        return name_table(config, layout)
    path, strip = {"vit": ("vision.", "vision_model."), "projector": ("projector.", "")}[layout]
    entries = [entry for entry in name_table(config) if entry.target.startswith(path)]
    return [
        dataclasses.replace(
            entry,
            parts=tuple(
                dataclasses.replace(part, source=part.source.removeprefix(strip))
                for part in entry.parts
            ),
        )
        for entry in entries
    ]


class _Weights:
    """The tensors of an export: what they are, and their values in the order of the parameters.

    Attributes:
        plan: name -> shape, dtype, in file order.
    """

    def __init__(self, source: Checkpoint, table: Sequence[Entry], dtype: Dtype):
        self._source, self._table = source, table
        self._adapters = {
            adapter.base.target: (lora, adapter)
            for lora, adapters in source.separate_adapters()
            for adapter in adapters
        }
        self._dtypes = {
            name: source.dtype(entry.target) if dtype == "keep" else np.dtype(NUMPY_DTYPES[dtype])
            for entry in table
            for name in entry.sources()
        }
        shapes = tensor_shapes(table, {entry.target: source.shape(entry.target) for entry in table})
        self.plan = {name: (shape, self._dtypes[name]) for name, shape in shapes.items()}

    def plan_as_read(self) -> Plan:
        """Returns the plan in the order of the parameters, so that shards are completed in turn.

        The release's order has all tensors of a layer together, of which each parameter has one.
        """
        order = dict.fromkeys(
            name
            for entry in self._table
            for layer in range(entry.layers or 1)
            for name in entry.sources(layer)
        )
        return {name: self.plan[name] for name in order}

    @property
    def dtype_name(self) -> str:
        """The dtype of most values."""
        sizes: dict[str, int] = {}
        for shape, dtype in self.plan.values():
            sizes[str(dtype)] = sizes.get(str(dtype), 0) + int(np.prod(shape))
        return max(sizes, key=lambda name: sizes[name])

    def pieces(self, report: Report | None = None) -> Iterator[tuple[str, str, int, np.ndarray]]:
        """Yields (parameter, tensor, first row, values).

        Args:
            report: counts merged adapters and values that the cast changes.

        Raises:
            CheckpointError: at the end, for values that are not finite.
        """
        problems: list[str] = []
        entries = {entry.target: entry for entry in self._table}
        pending: dict[str, HostArray] = {}  # adapters of the parameter that comes next
        for path, leaf in self._source.read_all(self._paths()):
            if path not in entries:
                pending[path] = leaf
                continue
            for name, row, values in self._tensors(entries[path], leaf, pending):
                cast = np.empty(values.shape, self._dtypes[name])
                copy_strided(cast, values)
                if bad := count_not_finite(cast):
                    problems.append(f"tensor {name} holds {bad} values that are NaN or infinite")
                if report is not None and (changed := changed_by_cast(values, cast)):
                    report.rounded[name] = report.rounded.get(name, 0) + changed
                del values  # or the parameter would stay in memory beside the next one
                yield path, name, row, cast
            if report is not None and pending:
                report.merged.append(path)
            pending = {}
            del leaf
        if problems:
            raise CheckpointError(self._source.path, problems)

    def _tensors(
        self, entry: Entry, leaf: HostArray, pending: Mapping[str, HostArray]
    ) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yields (tensor, first row, values) of one parameter with its adapters merged."""
        for layer in range(entry.layers or 1):
            array = np.asarray(leaf) if entry.layers is None else leaf[layer]
            if pending:
                lora, adapter = self._adapters[entry.target]
                pairs = [
                    (pending[a.target][layer], pending[b.target][layer]) for a, b in adapter.pairs
                ]
                array = adapter.merge(array, pairs, lora.scale)
            tensors = zip(entry.parts, entry.sources(layer), entry.to_sources(array), strict=True)
            for part, name, values in tensors:
                yield name, part.rows[0] if part.rows else 0, values

    def compare(self, written: SafetensorsFolder) -> int:
        """Compares the written tensors with the source bit for bit; returns how many are equal.

        Raises:
            CheckpointError: describes each tensor that differs.
        """
        problems: list[str] = []
        for _, name, row, values in self.pieces():
            found = written.read(name)
            if values.ndim:
                found = found[row : row + len(values)]
            problems += difference(name, values, found)
        problems += [
            f"{name} was not asked for" for name in set(written.names()) - self.plan.keys()
        ]
        if problems:
            raise CheckpointError(written.path, problems)
        return len(self.plan)

    def _paths(self) -> Iterator[str]:
        """Yields the adapters of each parameter, then the parameter."""
        for entry in self._table:
            if entry.target in self._adapters:
                yield from self._adapters[entry.target][1].targets
            yield entry.target


def _config_fields(
    source: Checkpoint,
    config: ModelConfig,
    layout: str,
    dtype: Dtype,
    weights: _Weights,
    image_token_id: int | None,
) -> dict[str, Any]:
    """Returns config.json: the source's own where it says the same, else with our fields in it."""
    base = source.fields
    kind = "internvl" if layout == "hf" else "internvl_chat"
    if base is None or base.get("model_type") != kind:
        base = None
    name = weights.dtype_name
    if base is not None and _says(base, config, list(weights.plan)):
        fields = dict(base)
        for lora in ("use_backbone_lora", "use_llm_lora"):
            if fields.get(lora):
                fields[lora] = 0
        if dtype != "keep":
            fields |= {field: name for field in ("torch_dtype", "dtype") if field in fields} or {
                "torch_dtype": name
            }
        return fields
    if layout != "hf":
        return chat_config(config, dtype=name, base=base)
    if image_token_id is None and base is not None:
        image_token_id = base.get("image_token_id")
    if image_token_id is None:
        tokenizer = Tokenizer.find(source.tokenizer_folder)
        image_token_id = None if tokenizer is None else tokenizer.image_token_id
    if image_token_id is None:
        raise ConfigError(
            "the hf config needs image_token_id, and no tokenizer that has it is available; give "
            "--image_token_id"
        )
    return hf_config(config, dtype=name, image_token_id=image_token_id, base=base)


def _says(base: Mapping[str, Any], config: ModelConfig, tensors: Sequence[str]) -> bool:
    """Says whether a config.json describes this model."""
    try:
        return model_config(base, tensors) == config
    except ConfigError:
        return False


def _side_files(source: Checkpoint, folder: Path, layout: str, fields: dict[str, Any]) -> list[str]:
    """Writes config.json and the small files around the weights; returns notes for the report."""
    source.write_side_files(folder)
    if layout == "hf":  # transformers has its own code for this layout
        fields.pop("auto_map", None)
        for file in folder.glob("*.py"):
            if not file.name.startswith("tokenization_"):
                file.unlink()
    write_json(folder / "config.json", fields)
    notes = []
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        notes.append("no tokenizer files: the source has none")
    if missing := missing_remote_code(fields, folder):
        notes.append(
            f"config.json names {', '.join(missing)}, which the source does not hold: PyTorch "
            "users cannot load the folder without them"
        )
    elif layout != "hf" and "auto_map" not in fields:
        notes.append(
            "config.json names no remote code (auto_map): the source brought none, so transformers "
            "needs the modeling files of the original repository to load this folder"
        )
    if layout != "hf" and fields.get("template") == "internvl_hf":
        notes.append(
            "config.json has the template internvl_hf, which InternVL's own code does not know: "
            "for that code set it to internvl2_5, whose prompts have a system message"
        )
    extra = [name for name in OTHER_FILES if (folder / name).is_file()]
    return notes + ([f"copied {', '.join(extra)}"] if extra else [])


def _write_adapters(source: Checkpoint, folder: Path, report: Report, verify: bool) -> None:
    """Writes one folder per part, vision_model and language_model, as peft reads them."""
    separate = source.separate_adapters()
    if not separate:
        raise ConfigError(
            "layout peft: no adapters lie beside the weights; import with --keep_lora keeps them "
            "there"
        )
    verified = 0
    for lora, adapters in separate:
        paths = [path for adapter in adapters for path in adapter.targets]
        target = folder / {"vision": "vision_model", "decoder": "language_model"}[lora.part]
        tensors = write_adapters(target, dict(source.read_all(paths)), source.config, lora)
        for array in tensors.values():
            report.count(lora.part, array)
        written = SafetensorsFolder(target, "adapter_model")
        report.files += [f"{target.name}/{file}" for file in written.files()]
        if verify:
            problems = [
                text
                for name, array in tensors.items()
                for text in difference(name, array, written.read(name))
            ]
            if problems:
                raise CheckpointError(target, problems)
            verified += len(tensors)
    report.verified = verified if verify else None
