"""Names the places where visual tokens enter the decoder, and the parameters that make them.

A model without LVTC has one place: the visual tokens of layer 0. LVTC adds a residual where the
sequence grows, and optionally injections behind it (design: lvtc.md 2). Released checkpoints hold
one projector, `projector.*`. One rule says where it serves: the first PVTC on the model's own token
grid, of layer 0 and the residual in this order, has the path `projector`. All others are new and
have paths below `lvtc`.

The module tree, the name table of checkpoints and the count of FLOPs read the same list.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from internvlx_jax.core.model_config import ModelConfig

RELEASED = "projector"


class ProjectorSite(NamedTuple):
    """Describes one projector of a model.

    Attributes:
        name: `low` makes the visual tokens of layer 0, `high` the residual of LVTC's expansion,
            `inject_<layer>` what is added in front of that layer.
        kind: What computes it; see models/projectors.py.
        grid: Tokens along one side of a tile.
        path: Dotted path of its parameters.
    """

    name: str
    kind: Literal["pvtc", "mlp1", "mlp"]
    grid: int
    path: str


def projector_sites(config: ModelConfig) -> tuple[ProjectorSite, ...]:
    """Returns the projectors of a model in the order of computation."""
    lvtc = config.lvtc
    if lvtc is None:
        return (ProjectorSite("low", config.projector.kind, config.token_grid, RELEASED),)
    low = ProjectorSite("low", lvtc.low_projector, lvtc.low_grid, "lvtc.low")
    high = ProjectorSite("high", lvtc.high_projector, lvtc.high_grid, "lvtc.high.projector")
    own = ("pvtc", config.token_grid)
    if (low.kind, low.grid) == own:
        low = low._replace(path=RELEASED)
    elif (high.kind, high.grid) == own:
        high = high._replace(path=RELEASED)
    injections = (
        ProjectorSite(name, lvtc.inject_projector, lvtc.high_grid, f"lvtc.{name}.projector")
        for name in (f"inject_{layer}" for layer in lvtc.inject_layers)
    )
    return (low, high, *injections)


def released_site(config: ModelConfig) -> ProjectorSite | None:
    """Returns the place that a released projector serves, or None where all projectors are new."""
    return next((site for site in projector_sites(config) if site.path == RELEASED), None)
