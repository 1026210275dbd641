"""The model with LVTC in float64 NumPy: lvtc.md 1 to 3, model.md 4 and 8, word by word.

Nothing of the package but its configs is used here: no index plans, no layouts, no padding, no
batch. Weights are taken by their dotted path. A segment is a list of pieces in the order of its
sequence: an integer array is text, an integer is a tile of the pool.
"""

import functools
import math

import numpy as np

from internvlx_jax.core.model_config import DecoderConfig, LvtcConfig, ModelConfig

Piece = np.ndarray | int
PVTC_HEADS = 16


def rms(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def upsample(low: np.ndarray, side: int, method: str) -> np.ndarray:
    """[a, b, d] -> [side, side, d]: bilinear as half-pixel centers, or the parent's copy."""
    old = low.shape[0]
    high = np.zeros((side, side, low.shape[-1]))
    for row in range(side):
        for column in range(side):
            if method == "nearest":
                high[row, column] = low[row * old // side, column * old // side]
                continue
            for i, weight_i in _neighbors(row, old, side):
                for j, weight_j in _neighbors(column, old, side):
                    high[row, column] += weight_i * weight_j * low[i, j]
    return high


def _neighbors(out: int, old: int, new: int) -> list[tuple[int, float]]:
    """The two inputs on either side of an output's center, with their weights."""
    center = min(max((out + 0.5) * old / new - 0.5, 0.0), old - 1.0)
    first = math.floor(center)
    return [(first, 1 - (center - first)), (min(first + 1, old - 1), center - first)]


class Oracle:
    """`tiles`: tower outputs [tile, 1 + patches, v] of the pool, class token first."""

    def __init__(self, config: ModelConfig, params: dict[str, np.ndarray], tiles: np.ndarray):
        self.config = config
        self.params = {path: np.asarray(value, np.float64) for path, value in params.items()}
        self.tiles = np.asarray(tiles, np.float64)
        self.visual_tokens = functools.cache(self._visual_tokens)

    @property
    def lvtc(self) -> LvtcConfig:
        return self.config.lvtc

    def hidden(self, pieces: list[Piece], positions: np.ndarray) -> np.ndarray:
        """Residual stream behind the last layer: [slots of the long layout, d].

        `positions` are of the long layout.
        """
        lvtc = self.lvtc
        stride = lvtc.high_grid // lvtc.low_grid
        # Shallow: the tokens of the low grid in the place of each tile.
        x, at, slot = [], [], 0
        for piece in pieces:
            if isinstance(piece, int):
                x.append(self.low(piece))
                at += [
                    positions[slot + a * stride * lvtc.high_grid + b * stride]
                    for a in range(lvtc.low_grid)
                    for b in range(lvtc.low_grid)
                ]
                slot += lvtc.high_grid**2
            else:
                x.append(self.params["decoder.embedding"][piece])
                at += list(positions[slot : slot + len(piece)])
                slot += len(piece)
        assert slot == len(positions)
        x, at = np.concatenate(x), np.asarray(at)
        for layer in range(lvtc.expand_layer):
            x = self.layer(layer, x, at)
        # Expansion: text as it is, each tile on its own.
        expanded, slot = [], 0
        for piece in pieces:
            width = lvtc.low_grid**2 if isinstance(piece, int) else len(piece)
            part, slot = x[slot : slot + width], slot + width
            if isinstance(piece, int):
                grid = part.reshape(lvtc.low_grid, lvtc.low_grid, -1)
                part = upsample(grid, lvtc.high_grid, lvtc.upsample).reshape(lvtc.high_grid**2, -1)
                part = part + self.added("lvtc.high", lvtc.high_projector, piece)
            expanded.append(part)
        x = np.concatenate(expanded)
        # Deep.
        for layer in range(lvtc.expand_layer, self.config.decoder.layers):
            if layer in lvtc.inject_layers:
                slot = 0
                for piece in pieces:
                    width = lvtc.high_grid**2 if isinstance(piece, int) else len(piece)
                    if isinstance(piece, int):
                        x[slot : slot + width] += self.added(
                            f"lvtc.inject_{layer}", lvtc.inject_projector, piece
                        )
                    slot += width
            x = self.layer(layer, x, positions)
        return x

    # Projectors

    def low(self, tile: int) -> np.ndarray:
        released = (
            self.lvtc.low_projector == "pvtc" and self.lvtc.low_grid == self.config.token_grid
        )
        return self.visual_tokens(
            "projector" if released else "lvtc.low",
            self.lvtc.low_projector,
            self.lvtc.low_grid,
            tile,
        )

    def added(self, path: str, kind: str, tile: int) -> np.ndarray:
        """gate * P(V) on the high grid.

        Without a gate P(V) itself. The released projector has no copy under `path`.
        """
        gate = 1.0 if self.lvtc.gate is None else self.params[f"{path}.gate"]
        own = any(name.startswith(f"{path}.projector.") for name in self.params)
        return gate * self.visual_tokens(
            f"{path}.projector" if own else "projector", kind, self.lvtc.high_grid, tile
        )

    def _visual_tokens(self, path: str, kind: str, grid: int, tile: int) -> np.ndarray:
        """Tokens of one tile, row-major over the grid: [q, d]."""
        side = math.isqrt(self.tiles.shape[1] - 1) // grid
        patches = self.tiles[tile, 1:].reshape(grid * side, grid * side, -1)
        regions = [
            patches[a * side : (a + 1) * side, b * side : (b + 1) * side].reshape(side * side, -1)
            for a in range(grid)
            for b in range(grid)
        ]
        if kind == "mlp":
            return np.stack([self.mlp(path, region.reshape(-1)) for region in regions])
        return np.stack(
            [self.pvtc(path, region, query, tile) for query, region in enumerate(regions)]
        )

    def mlp(self, path: str, region: np.ndarray) -> np.ndarray:
        normed = rms(region, self.params[f"{path}.norm.weight"], 1e-6)
        return silu(normed @ self.params[f"{path}.fc1.kernel"]) @ self.params[f"{path}.fc2.kernel"]

    def pvtc(self, path: str, region: np.ndarray, query: int, tile: int) -> np.ndarray:
        """One region [m, v] -> its token [d]: what the region asks of itself, and what the class
        token asks of it.
        """
        keys = self.small_map(f"{path}.region_kv", region)
        local = self.small_map(f"{path}.local_query", region.reshape(-1))
        by_class = (
            self.small_map(f"{path}.global_query", self.tiles[tile, 0])
            * self.params[f"{path}.cls_scale"][query]
        )
        return self.block(f"{path}.attn_local", local, keys) + self.block(
            f"{path}.attn_global", by_class, keys
        )

    def small_map(self, path: str, x: np.ndarray) -> np.ndarray:
        return silu(
            rms(x, self.params[f"{path}.norm.weight"], 1e-6) @ self.params[f"{path}.linear.kernel"]
        )

    def block(self, path: str, u: np.ndarray, kv: np.ndarray) -> np.ndarray:
        """One query [d] and the keys of its region [m, d]."""

        def weight(name):
            return self.params[f"{path}.{name}"]

        query, keys = (
            rms(u, weight("attn.q_norm.weight"), 1e-6),
            rms(kv, weight("attn.kv_norm.weight"), 1e-6),
        )
        heads = []
        for n in range(PVTC_HEADS):
            q = query @ weight("attn.q.kernel")[:, n]
            k = keys @ weight("attn.k.kernel")[:, n]
            v = keys @ weight("attn.v.kernel")[:, n]
            heads.append(softmax(k @ q / math.sqrt(len(q))) @ v @ weight("attn.proj.kernel")[n])
        u = u + sum(heads)
        y = rms(u, weight("mlp.norm.weight"), 1e-6)
        return u + (silu(y @ weight("mlp.gate.kernel")) * (y @ weight("mlp.up.kernel"))) @ weight(
            "mlp.down.kernel"
        )

    # Decoder

    def layer(self, layer: int, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """One block on one segment: [t, d], causal in the order of the sequence."""
        config: DecoderConfig = self.config.decoder

        def weight(name):
            return self.params[f"decoder.layers.{name}"][layer]

        y = rms(x, weight("attn_norm.weight"), config.eps)
        future = np.triu(np.full((len(x), len(x)), -np.inf), k=1)
        group = config.heads // config.kv_heads
        attended = 0
        for k in range(config.kv_heads):
            kernel = weight("attn.qkv.kernel")[:, k]  # [d, queries of the group | key | value, h]
            key, value = self.rotate(y @ kernel[:, group], positions), y @ kernel[:, group + 1]
            for j in range(group):
                query = self.rotate(y @ kernel[:, j], positions)
                mixed = softmax(query @ key.T / math.sqrt(config.head_dim) + future) @ value
                attended = attended + mixed @ weight("attn.out.kernel")[k * group + j]
        x = x + attended
        y = rms(x, weight("mlp_norm.weight"), config.eps)
        return x + (silu(y @ weight("mlp.gate.kernel")) * (y @ weight("mlp.up.kernel"))) @ weight(
            "mlp.down.kernel"
        )

    def rotate(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
        half = self.config.decoder.head_dim // 2
        inverse = self.config.decoder.rope.theta ** (-np.arange(half) / half)
        angle = positions[:, None] * inverse
        cos, sin = np.tile(np.cos(angle), 2), np.tile(np.sin(angle), 2)
        return x * cos + np.concatenate([-x[:, half:], x[:, :half]], axis=1) * sin
