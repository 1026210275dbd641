"""internvlx-jax: InternVL-X (arXiv 2503.21307) in JAX and Flax NNX."""

__version__ = "0.1.0"
__all__ = ["load_pretrained"]


def __getattr__(name):
    # Lazy, so that data workers import this package without importing jax.
    if name == "load_pretrained":
        from internvlx_jax.inference.loading import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
