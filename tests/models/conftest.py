"""Golden checkpoints, loaded in float32 at the highest matmul precision."""

import dataclasses

import jax
import numpy as np
import pytest

from internvlx_jax import load_pretrained

MODELS = ("internlm2", "internlm2_qknorm", "qwen2")
IMAGE_TOKEN = 7


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden checkpoint with its stored inputs and outputs."""

    name: str
    model: object
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def load_golden(golden):
    cache = {}

    def load(name: str) -> Golden:
        if name not in cache:
            folder = golden / name
            model = load_pretrained(folder, dtype="float32").model
            cache[name] = Golden(
                name,
                model,
                dict(np.load(folder / "inputs.npz")),
                dict(np.load(folder / "outputs.npz")),
            )
        return cache[name]

    return load


@pytest.fixture(scope="session", params=MODELS)
def parity(request, load_golden) -> Golden:
    return load_golden(request.param)


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
