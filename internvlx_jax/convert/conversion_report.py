"""What a conversion did, as JSON and as text (design: checkpoints.md 8, 10)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from internvlx_jax.core.model_config import ModelConfig


@dataclasses.dataclass
class Report:
    """One conversion.

    Attributes:
        parameters, nbytes: by module and dtype, e.g. `decoder`, `bfloat16`.
        initialised: parameters that start fresh, with what their values look like.
        rounded: parameters, or tensors, with values that the cast has changed -> how many.
        merged, kept: parameters with adapters in them; adapters beside the weights.
        verified: how many were read back and found bit-equal; None without --verify.
    """

    command: str
    config: ModelConfig
    layout: str
    notes: list[str] = dataclasses.field(default_factory=list)
    parameters: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    nbytes: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    initialised: dict[str, str] = dataclasses.field(default_factory=dict)
    rounded: dict[str, int] = dataclasses.field(default_factory=dict)
    merged: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    verified: int | None = None

    def count(self, path: str, array: np.ndarray) -> None:
        self.parameters[path.split(".")[0]] += array.size
        self.nbytes[str(array.dtype)] += array.nbytes

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: dict(value) if isinstance(value, defaultdict) else value
            for name, value in fields.items()
            if name != "config"
        }

    def text(self) -> str:
        lines = [describe(self.config, self.layout)]
        lines += [
            f"  {module:<12}{count:>16,} parameters" for module, count in self.parameters.items()
        ]
        total = ", ".join(f"{size:,} bytes {dtype}" for dtype, size in self.nbytes.items())
        lines.append(f"  {'total':<12}{sum(self.parameters.values()):>16,} parameters, {total}")
        lines += [f"  wrote {name}" for name in self.files]
        lines += [f"  initialised {path}: {what}" for path, what in self.initialised.items()]
        if self.rounded:
            lines.append(
                f"  the cast changed {sum(self.rounded.values()):,} values in {len(self.rounded)} of the "
                f"{'tensors' if self.command == 'export' else 'parameters'}"
            )
        if self.merged:
            lines.append(f"  LoRA merged into {len(self.merged)} parameters")
        if self.kept:
            lines.append(f"  {len(self.kept)} LoRA parameters kept beside the weights")
        lines += [f"  note: {note}" for note in self.notes]
        if self.verified is not None:
            lines.append(f"  verified: {self.verified} read back, all bit-equal")
        return "\n".join(lines)


def describe(config: ModelConfig, layout: str) -> str:
    """One line: layout, tower, projector, decoder."""
    vision, decoder = config.vision, config.decoder
    lvtc = (
        "" if config.lvtc is None else f" with LVTC {config.lvtc.low_grid}->{config.lvtc.high_grid}"
    )
    return (
        f"{layout}: InternViT {vision.layers} x {vision.width} at {vision.image_size} px, {config.projector.kind} "
        f"({config.token_grid**2} tokens a tile){lvtc}, {decoder.family} {decoder.layers} x {decoder.width}, "
        f"{decoder.vocab_size:,} rows, template {config.prompt.template}"
    )
