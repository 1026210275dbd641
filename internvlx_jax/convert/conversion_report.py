"""What a conversion did, as JSON and as text (design: checkpoints.md 8, 10)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np

from internvlx_jax.core.model_config import ModelConfig


@dataclasses.dataclass
class Report:
    """Collects what one conversion does, while it does it.

    Attributes:
        command: import or export.
        config: the model.
        layout: internvl-x, internvl, hf, vit, projector or peft.
        notes: sentences for the user.
        parameters: module, e.g. `decoder` -> parameters.
        nbytes: dtype, e.g. `bfloat16` -> bytes.
        initialized: parameters that start fresh -> what their values look like.
        rounded: parameters, or tensors, with values that the cast has changed -> how many.
        merged: parameters with adapters in them.
        kept: adapters beside the weights.
        files: the weight files written.
        verified: how many were read back and found bit-equal; None without --verify.
    """

    command: str
    config: ModelConfig
    layout: str
    notes: list[str] = dataclasses.field(default_factory=list)
    parameters: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    nbytes: dict[str, int] = dataclasses.field(default_factory=lambda: defaultdict(int))
    initialized: dict[str, str] = dataclasses.field(default_factory=dict)
    rounded: dict[str, int] = dataclasses.field(default_factory=dict)
    merged: list[str] = dataclasses.field(default_factory=list)
    kept: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)
    verified: int | None = None

    def count(self, path: str, array: np.ndarray) -> None:
        """Adds an array to the totals of its module and dtype."""
        self.parameters[path.split(".")[0]] += array.size
        self.nbytes[str(array.dtype)] += array.nbytes

    def to_json(self) -> dict[str, Any]:
        """Returns all fields but the config."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: dict(value) if isinstance(value, defaultdict) else value
            for name, value in fields.items()
            if name != "config"
        }

    def text(self) -> str:
        """Returns the report in lines for the terminal."""
        lines = [describe(self.config, self.layout)]
        lines += [
            f"  {module:<12}{count:>16,} parameters" for module, count in self.parameters.items()
        ]
        total = ", ".join(f"{size:,} bytes {dtype}" for dtype, size in self.nbytes.items())
        lines.append(f"  {'total':<12}{sum(self.parameters.values()):>16,} parameters, {total}")
        lines += [f"  wrote {name}" for name in self.files]
        lines += [f"  initialized {path}: {what}" for path, what in self.initialized.items()]
        if self.rounded:
            kind = "tensors" if self.command == "export" else "parameters"
            lines.append(
                f"  the cast changed {sum(self.rounded.values()):,} values in {len(self.rounded)} "
                f"of the {kind}"
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
    """Returns one line on layout, tower, projector and decoder."""
    vision, decoder, lvtc = config.vision, config.decoder, config.lvtc
    grids = "" if lvtc is None else f" with LVTC {lvtc.low_grid}->{lvtc.high_grid}"
    return (
        f"{layout}: InternViT {vision.layers} x {vision.width} at {vision.image_size} px, "
        f"{config.projector.kind} ({config.token_grid**2} tokens per tile){grids}, "
        f"{decoder.family} {decoder.layers} x {decoder.width}, "
        f"{decoder.vocab_size:,} rows, template {config.prompt.template}"
    )
