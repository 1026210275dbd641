"""Reads LoRA folders as peft writes them (design: checkpoints.md 9).

The adapters may be those of one part or of the whole model, on some projections and layers only,
of several ranks, and with whole modules that were trained beside them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvlx_jax.checkpoints.adapters import (
    PARTS,
    AdapterTensors,
    Lora,
    ModelPart,
    Strength,
    adapter_table,
    find_adapters,
    part_prefixes,
)
from internvlx_jax.checkpoints.name_entries import Entry
from internvlx_jax.checkpoints.name_table import NESTED
from internvlx_jax.checkpoints.tensors import RenamedTensors, Tensors
from internvlx_jax.core.errors import CheckpointError, ConfigError
from internvlx_jax.core.json_text import read_json_object, shown
from internvlx_jax.core.model_config import LoraConfig

# Fields of adapter_config.json that change what an adapter computes.
REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "target_parameters",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
)
# Ways to start that move a part of the base weights into the adapter.
MOVING = ("pissa", "olora", "corda", "loftq")
_ROOT = "base_model.model."


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """An opened LoRA folder.

    Attributes:
        loras: the adapters by part of the model.
        whole: name in the checkpoint -> (folder, name in it) of weights that were trained whole.
        notes: what a report should mention.
    """

    loras: tuple[Lora, ...]
    whole: Mapping[str, tuple[Tensors, str]]
    notes: tuple[str, ...]

    def replaced(self, weights: Tensors) -> Tensors:
        """Returns base weights with those that were trained whole in their place."""
        if not self.whole:
            return weights
        return RenamedTensors({name: (weights, name) for name in weights.names()} | {**self.whole})


def read_adapter_config(folder: Path, part: ModelPart) -> LoraConfig:
    """Reads rank and scale from adapter_config.json of peft.

    Args:
        folder: the LoRA folder.
        part: part of the model that its adapters belong to.

    Raises:
        ConfigError: the file is missing, or asks for something that is not supported.
    """
    stored = _read_fields(folder)
    file = folder / "adapter_config.json"
    rank, alpha = (_number(file, stored, name) for name in ("r", "lora_alpha"))
    try:
        return LoraConfig(
            part=part,
            rank=int(rank),
            alpha=float(alpha),
            dropout=stored.get("lora_dropout") or 0.0,
            use_rslora=bool(stored.get("use_rslora")),
        )
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _number(file: Path, stored: Mapping[str, Any], name: str) -> float:
    value = stored.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        what = "is missing" if value is None else f"is {value!r}, expected a number"
        raise ConfigError(f"{file}: {name} {what}")
    return value


def _read_fields(folder: Path) -> dict[str, Any]:
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ConfigError(f"{file} is missing: a LoRA folder of peft has one")
    stored = read_json_object(file)
    if stored.get("peft_type") != "LORA":
        raise ConfigError(
            f"{file}: peft_type is {stored.get('peft_type')!r}; only 'LORA' is supported"
        )
    for field in REFUSED:
        if stored.get(field):
            raise ConfigError(
                f"{file}: {field} = {stored[field]!r} is not supported; merge the adapter with peft"
            )
    if (stored.get("bias") or "none") != "none":
        raise ConfigError(
            f"{file}: bias = {stored['bias']!r} is not supported, only 'none'; merge the adapter "
            "with peft"
        )
    if stored.get("fan_in_fan_out"):
        raise ConfigError(
            f"{file}: fan_in_fan_out = true is not supported: the linear maps here are [out, in]"
        )
    start = stored.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVING):
        raise ConfigError(
            f"{file}: init_lora_weights = {start!r} begins with other base weights than the "
            "checkpoint's; merge the adapter with peft, or let peft convert it"
        )
    _check_types(file, stored)
    return stored


def _check_types(file: Path, stored: Mapping[str, Any]) -> None:
    """Raises ConfigError for a field that decides the result and is of another kind."""
    for name, least in (("r", 1), ("lora_alpha", 0)):
        value = _number(file, stored, name)
        if not math.isfinite(value) or value < least or (name == "lora_alpha" and value == 0):
            raise ConfigError(f"{file}: {name} is {value}, it must be a number above 0")
    if stored.get("use_rslora") not in (None, True, False):
        raise ConfigError(f"{file}: use_rslora is {shown(stored['use_rslora'])}, expected a flag")
    saved = stored.get("modules_to_save")
    if saved is not None and not _is_texts(saved):
        raise ConfigError(
            f"{file}: modules_to_save is {shown(saved)}, expected a list of names; correct it"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = stored.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise ConfigError(f"{file}: {field} is {shown(patterns)}, expected an object")
        for pattern, value in patterns.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not value > 0 or (field == "rank_pattern" and value != int(value)):
                raise ConfigError(
                    f"{file}: {field} gives {shown(pattern)} {shown(value)}, expected a number "
                    "above 0"
                )
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"{file}: {field} has {shown(pattern)}, which is no regular expression "
                    f"({error}); correct it"
                ) from None


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def read_peft_folder(
    folder: Path,
    table: Sequence[Entry],
    layout: str,
    tensors: Tensors,
    weights: Tensors,
    *,
    keep: bool = False,
) -> PeftFolder:
    """Opens a LoRA folder of peft.

    Args:
        folder: the LoRA folder.
        table: name table of the checkpoint that the adapters belong to.
        layout: the table's layout.
        tensors: tensors of the folder.
        weights: base weights of the checkpoint, under the names of `table`.
        keep: whether the adapters will stay beside the weights; one rank has to serve all then.

    Raises:
        ConfigError: adapter_config.json cannot be used.
        CheckpointError: lists every tensor that does not fit.
    """
    stored = _read_fields(folder)
    full = _full_names(folder, table, layout, tensors, weights)
    adapters = {name: place for name, place in full.items() if ".lora_" in name}
    whole = {name: place for name, place in full.items() if ".lora_" not in name}
    problems = _check_whole(stored, whole, weights)
    loras, notes = [], []
    for part, prefix in part_prefixes(layout).items():
        own = RenamedTensors(adapters).starting_with(prefix)
        if own.names():
            lora, wrong = _read_part(folder, stored, table, part, own, weights, keep)
            problems += wrong
            loras.append(lora)
            notes += _coverage(folder, lora, table)
    known = tuple(part_prefixes(layout).values())
    problems += [
        f"adapter tensor {name} belongs to no part that has adapters here (layers of tower and "
        "decoder); merge the adapter with peft"
        for name in adapters
        if not name.startswith(known)
    ]
    if not loras and not whole and not problems:
        problems = ["the folder holds no tensors; train the adapter again, or leave --lora out"]
    if problems:
        raise CheckpointError(folder, problems)
    if whole:
        notes.append(f"{folder}: trained whole and taken from there: {', '.join(sorted(whole))}")
    return PeftFolder(tuple(loras), whole, tuple(notes))


def _full_names(
    folder: Path, table: Sequence[Entry], layout: str, tensors: Tensors, weights: Tensors
) -> dict[str, tuple[Tensors, str]]:
    """Returns the name in the checkpoint of every tensor -> its place in the folder.

    peft names modules as the model that it wrapped does: a part of it, or all of it in one of the
    two spellings. The reading that fits most tensors is taken.
    """
    problems, short = [], {}
    for name in tensors.names():
        plain = re.sub(r"\.(lora_[AB])\.[^.]+\.weight$", r".\1.weight", name)
        plain = plain.replace(".modules_to_save.default.", ".")
        if not plain.startswith(_ROOT) or not plain.endswith((".weight", ".bias")):
            problems.append(
                f"{name}: expected base_model.model.NAME.lora_A.weight or .lora_B.weight"
            )
        short[plain.removeprefix(_ROOT)] = name
    if problems:
        raise CheckpointError(folder, problems)
    known = set(weights.names())
    for part in PARTS:
        for adapter in adapter_table(table, part):
            known.update(n for pair in adapter.pairs for entry in pair for n in entry.sources())
    prefixes = [*part_prefixes(layout).values(), ""]
    readings = [{name: prefix + name for name in short} for prefix in prefixes]
    readings.append({name: _unnested(name) for name in short})
    best = max(readings, key=lambda names: sum(full in known for full in names.values()))
    return {full: (tensors, short[name]) for name, full in best.items()}


def _unnested(name: str) -> str:
    prefix = next((prefix for prefix in NESTED if name.startswith(prefix)), None)
    return name if prefix is None else NESTED[prefix] + name.removeprefix(prefix)


def _read_part(
    folder: Path,
    stored: Mapping[str, Any],
    table: Sequence[Entry],
    part: ModelPart,
    tensors: RenamedTensors,
    weights: Tensors,
    keep: bool,
) -> tuple[Lora, list[str]]:
    """Returns the adapters of one part, and what is wrong with them."""
    config = read_adapter_config(folder, part)
    strengths = _strengths(folder, stored, config, tensors)
    if strengths:
        if keep:
            raise ConfigError(
                f"{folder / 'adapter_config.json'}: rank_pattern or alpha_pattern gives modules "
                "ranks or scales of their own, which adapters beside the weights cannot have; "
                "leave --keep_lora out, and they are merged"
            )
        rank = max(config.rank, *(own.rank for own in strengths.values()))
        alpha = config.scale * (rank**0.5 if config.use_rslora else rank)
        all_modules = {_module(name) for name in tensors.names()}
        strengths = {
            module: strengths.get(module, Strength(config.rank, config.scale))
            for module in all_modules
        }
        config = dataclasses.replace(config, rank=rank, alpha=alpha)
    adapters, problems = find_adapters(table, config, tensors, strengths)
    filled = AdapterTensors(tensors, weights, config, strengths)
    return Lora(config, tuple(adapters), filled), problems


def _strengths(
    folder: Path, stored: Mapping[str, Any], config: LoraConfig, tensors: Tensors
) -> dict[str, Strength]:
    """Returns module -> rank and scale of the modules that a pattern of peft names."""
    ranks, alphas = stored.get("rank_pattern") or {}, stored.get("alpha_pattern") or {}
    found = {}
    for module in {_module(name) for name in tensors.names()}:
        rank, alpha = (_matching(patterns, module) for patterns in (ranks, alphas))
        if rank is not None or alpha is not None:
            own = dataclasses.replace(
                config,
                rank=config.rank if rank is None else rank,
                alpha=config.alpha if alpha is None else alpha,
            )
            found[module] = Strength(own.rank, own.scale)
    if (ranks or alphas) and not found:
        raise ConfigError(
            f"{folder / 'adapter_config.json'}: rank_pattern and alpha_pattern "
            f"({', '.join((*ranks, *alphas))}) match no module of the folder; correct them"
        )
    return found


def _matching(patterns: Mapping[str, Any], module: str) -> Any:
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), None
    )


def _module(name: str) -> str:
    return re.sub(r"\.lora_[AB]\.weight$", "", name)


def _check_whole(
    stored: Mapping[str, Any], whole: Mapping[str, tuple[Tensors, str]], weights: Tensors
) -> list[str]:
    """Returns what is wrong with the weights that were trained whole."""
    problems, known = [], set(weights.names())
    for name, (tensors, own) in whole.items():
        if name not in known:
            problems.append(f"tensor {own} is none of the checkpoint's weights")
        elif tensors.shape(own) != weights.shape(name):
            problems.append(
                f"tensor {own} has shape {list(tensors.shape(own))}, the checkpoint's {name} "
                f"{list(weights.shape(name))}; merge the adapter with peft if the vocabulary grew"
            )
    for module in stored.get("modules_to_save") or ():
        pattern = re.compile(rf"(.*\.)?{re.escape(str(module))}\.(.*\.)?(weight|bias)")
        if not any(pattern.fullmatch(name) for name in whole):
            problems.append(
                f"adapter_config.json: modules_to_save lists {module}, of which the folder holds "
                "no tensor; copy the whole folder, or merge the adapter with peft"
            )
    return problems


def _coverage(folder: Path, lora: Lora, table: Sequence[Entry]) -> list[str]:
    """Says how many linear maps have an adapter, where some have none."""
    having = sum(name.endswith("lora_A.weight") for name in lora.tensors.names())
    total = len(
        {
            name
            for adapter in adapter_table(table, lora.config.part)
            for a, _ in adapter.pairs
            for name in a.sources()
        }
    )
    if having == total:
        return []
    return [
        f"{folder}: {having} of {total} linear maps of the {lora.config.part} part have an "
        "adapter; the others keep their weights"
    ]
