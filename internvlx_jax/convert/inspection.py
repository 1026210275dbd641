"""`convert inspect`: what a folder is, and what it lacks (design: checkpoints.md 10, 11)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from internvlx_jax.checkpoints.decoder_fields import ARCHITECTURES
from internvlx_jax.checkpoints.hf_folder import HFFolder, open_tensors, read_config
from internvlx_jax.checkpoints.peft_folder import read_adapter_config
from internvlx_jax.checkpoints.run_folder import RunFolder
from internvlx_jax.checkpoints.safetensors_folder import SafetensorsFolder, bits
from internvlx_jax.checkpoints.torch_bin import BinFolder
from internvlx_jax.convert.conversion_report import describe
from internvlx_jax.core.errors import CheckpointError
from internvlx_jax.models.lora import is_adapter
from internvlx_jax.models.params import abstract_model

# (tensors, parameters) of public checkpoints (checkpoints.md 11).
KNOWN = {
    (538, 2_340_502_528): "InternVL-X-2B or -2B-HD",
    (594, 8_604_910_592): "InternVL-X-8B or -8B-HD",
    (517, 2_205_754_368): "InternVL2-2B or InternVL2_5-2B",
    (573, 8_075_365_376): "InternVL2-8B or InternVL2_5-8B",
    (661, 2_205_754_368): "InternVL2-2B in the hf layout",
    (733, 8_075_365_376): "InternVL2-8B in the hf layout",
    (340, 304_012_288): "InternViT-300M",
    (589, 5_536_496_000): "InternViT-6B, 45 layers",
    (171, 1_889_110_016): "InternLM2-1.8B",
    (227, 7_737_708_544): "InternLM2.5-7B",
}


# What prompts and tiles need and the hf layout need not say; an inspection goes on without it.
LACKING = {
    "template": "unknown",
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "max_dynamic_patch": 12,
}


@dataclasses.dataclass(frozen=True)
class Inventory:
    """A folder in numbers.

    Attributes:
        path: the folder.
        what: its kind, and the sizes of the model.
        files: weight files; empty for a run folder.
        tensors: number of tensors, or of parameters in a run folder.
        parameters: module -> parameters.
        nbytes: dtype -> bytes.
        known_as: the public checkpoints with these numbers, if any.
        notes: sentences for the user.
        problems: what the described model lacks, or does not take.
    """

    path: Path
    what: str
    files: list[str]
    tensors: int
    parameters: dict[str, int]
    nbytes: dict[str, int]
    known_as: str | None
    notes: list[str]
    problems: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns all fields as JSON can hold them."""
        return dataclasses.asdict(self) | {"path": str(self.path)}

    def text(self) -> str:
        """Returns the inventory in lines for the terminal."""
        lines = [f"{self.path}: {self.what}"]
        lines += [
            f"  {module:<22}{count:>16,} parameters" for module, count in self.parameters.items()
        ]
        sizes = ", ".join(f"{size:,} bytes {dtype}" for dtype, size in self.nbytes.items())
        total = sum(self.parameters.values())
        lines.append(f"  {'total':<22}{total:>16,} parameters, {self.tensors} tensors, {sizes}")
        if self.known_as:
            lines.append(f"  the numbers are those of {self.known_as}")
        lines += [f"  in {', '.join(self.files)}"] if self.files else []
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  problem: {problem}" for problem in self.problems] or [
            "  nothing missing, nothing extra"
        ]
        return "\n".join(lines)


def inspect(path: Path) -> Inventory:
    """Describes a folder of any kind: a checkpoint, a tower, a decoder, a projector, or adapters.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: no such folder, or no config.json in it.
        ConfigError: config.json asks for something that is not computed here.
        CheckpointError: the weight files cannot be read at all.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; give a checkpoint folder")
    if RunFolder.is_one(path):
        return _run(path)
    if (path / "adapter_config.json").is_file() or any(path.glob("adapter_model.*")):
        config = read_adapter_config(path, "decoder")
        what = f"peft: LoRA of rank {config.rank}, alpha {config.alpha:g}"
        return _count(path, what, open_tensors(path, "adapter_model"))
    tensors = open_tensors(path)
    if not (path / "config.json").is_file() and any(
        "cls_scale" in name or "mlp1." in name for name in tensors.names()
    ):
        return _count(path, "projector: a projector alone", tensors)
    fields = read_config(path)
    size = f"{fields.get('num_hidden_layers')} x {fields.get('hidden_size')} alone"
    if fields.get("model_type") == "intern_vit_6b":
        return _count(path, f"vit: InternViT {size}", tensors)
    named = fields.get("architectures")
    named = named[0] if isinstance(named, list) and named else None
    if isinstance(named, str) and named in ARCHITECTURES:
        family = ARCHITECTURES[named]
        return _count(path, f"llm: {family} {size}", tensors)
    return _whole(path, tensors, fields)


def _whole(path: Path, tensors: SafetensorsFolder | BinFolder, fields: dict[str, Any]) -> Inventory:
    """Describes a whole checkpoint."""
    is_hf = fields.get("model_type") == "internvl"
    folder = HFFolder(
        path, fields={key: value for key, value in LACKING.items() if is_hf and key not in fields}
    )
    found = _count(path, describe(folder.config, folder.layout), tensors)
    notes, problems = list(found.notes), []
    if folder.lora:
        ranks = ", ".join(f"{lora.config.part} rank {lora.config.rank}" for lora in folder.lora)
        notes.append(f"LoRA in place ({ranks}); import merges it, or keeps it with --keep_lora")
    try:
        folder.check(abstract_model(folder.config, dtype="float32"))
    except CheckpointError as error:
        problems = error.problems
    return dataclasses.replace(found, notes=notes, problems=problems)


def _run(path: Path) -> Inventory:
    """Describes one step of a run folder."""
    folder = RunFolder(path)
    parameters, nbytes = defaultdict(int), defaultdict(int)
    for name in folder.shapes:
        size = math.prod(folder.shape(name))
        parameters["lora" if is_adapter(name) else name.split(".")[0]] += size
        nbytes[str(folder.dtype(name))] += size * folder.dtype(name).itemsize
    problems = []
    try:
        folder.check(abstract_model(folder.config, dtype="float32"))
    except CheckpointError as error:
        problems = error.problems
    notes = [
        f"LoRA of the {lora.part} part beside the weights, rank {lora.rank}" for lora in folder.lora
    ]
    return Inventory(
        path,
        f"JAX checkpoint, step {folder.step}; " + describe(folder.config, "run folder"),
        [],
        len(folder.shapes),
        dict(parameters),
        dict(nbytes),
        None,
        notes,
        problems,
    )


def _count(path: Path, what: str, tensors: SafetensorsFolder | BinFolder) -> Inventory:
    """Counts the tensors of a folder."""
    parameters, nbytes = defaultdict(int), defaultdict(int)
    for name in tensors.names():
        size = math.prod(tensors.shape(name))
        parameters[_module(name)] += size
        nbytes[tensors.dtype(name)] += size * bits(tensors.dtype(name)) // 8
    known = KNOWN.get((len(tensors.names()), sum(parameters.values())))
    return Inventory(
        path,
        what,
        tensors.files(),
        len(tensors.names()),
        dict(parameters),
        dict(nbytes),
        known,
        list(tensors.notes),
        [],
    )


def _module(name: str) -> str:
    """Returns the first word of a tensor's name, behind the prefixes of transformers and peft."""
    return re.sub(r"^(base_model\.)?(model\.)*", "", name).split(".")[0]
