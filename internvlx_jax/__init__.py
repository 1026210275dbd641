"""internvlx-jax: InternVL-X (arXiv 2503.21307) in JAX and Flax NNX."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvlx_jax.inference.loading import load_pretrained
    from internvlx_jax.inference.vlm import VLM, load

__version__ = "0.1.0"
__all__ = ["VLM", "load", "load_pretrained"]

# Imported when they are first used: data workers and config files import this package without jax.
_MODULES = {
    "VLM": "internvlx_jax.inference.vlm",
    "load": "internvlx_jax.inference.vlm",
    "load_pretrained": "internvlx_jax.inference.loading",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
