"""Attention backends against the plain formula: packed rows with padding, the two layouts of LVTC,
grouped queries, head dims 64 and 128, tiles; outputs and gradients; on one device and on a mesh
(model.md 3, 8; platform.md 2).

cuDNN needs a GPU: `make test-gpu`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.inputs import Inputs
from internvlx_jax.core.model_config import (
    DecoderConfig,
    LvtcConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.batch import feature_index, short_layout
from internvlx_jax.models.attention import SelfAttention, attend
from internvlx_jax.models.params import abstract_model, unflatten
from internvlx_jax.models.sharding import activation_shardings, make_mesh
from internvlx_jax.models.splash import BLOCK, DQ_PARTS, LANES, blocks

ALLOW_TPU_KERNELS = [jax.export.DisabledSafetyCheck.custom_call("tpu_custom_call")]


def formula(q, k, v, segments, causal):
    """softmax(q k / sqrt(H)) v with a loop over rows and heads, in the float64 of NumPy.

    For values only.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    visible = (
        np.tril(np.ones((q.shape[1],) * 2, bool)) if causal else np.ones((q.shape[1],) * 2, bool)
    )
    for row in range(q.shape[0]):
        seen = (
            visible
            if segments is None
            else visible & (segments[row][:, None] == segments[row][None])
        )
        for head in range(q.shape[2]):
            group = head // (q.shape[2] // k.shape[2])
            scores = q[row, :, head] @ k[row, :, group].T / q.shape[-1] ** 0.5
            weights = np.where(seen, np.exp(scores - scores.max()), 0)
            out[row, :, head] = weights / weights.sum(axis=1, keepdims=True) @ v[row, :, group]
    return out


def arrays(rows, length, heads, kv_heads, head_dim, dtype=jnp.float32):
    """q, k, v and the gradient that comes back to the output."""
    keys = jax.random.split(jax.random.key(length), 4)
    return [
        jax.random.normal(key, (rows, length, n, head_dim), dtype)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads))
    ]


def packed(rows, length, *borders):
    """int32[B, S]: two segments, then padding; each next row is shifted by 3 slots."""
    first, second = borders
    slots = np.arange(length)
    return np.stack(
        [
            np.where(slots < first - 3 * row, 1, np.where(slots < second - 3 * row, 2, 0))
            for row in range(rows)
        ]
    ).astype(np.int32)


def output_and_gradients(compute, q, k, v, do):
    out, back = jax.vjp(compute, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *back(do))))


def assert_close(ours, expected, atol):
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], atol=atol, rtol=0, err_msg=name)


CASES = {
    # rows, length, heads, kv heads, head dim, segments, causal
    "packed_padded": (2, 190, 4, 2, 64, (77, 160), True),
    "one_block": (2, 128, 4, 1, 128, (64, 128), True),
    "long_frame": (2, 576, 2, 1, 64, (262, 534), True),
    "tile": (1, 521, 2, 2, 64, None, False),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Arrays, segments, causal, and what the plain formula makes of them."""
    rows, length, heads, kv_heads, head_dim, borders, causal = CASES[request.param]
    q, k, v, do = arrays(rows, length, heads, kv_heads, head_dim)
    segments = None if borders is None else packed(rows, length, *borders)

    def plain(q, k, v):
        return attend(
            q, k, v, q_segments=segments, kv_segments=segments, q_start=0 if causal else None
        )

    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda *a: output_and_gradients(plain, *a))(q, k, v, do)
    np.testing.assert_allclose(expected["out"], formula(q, k, v, segments, causal), atol=2e-6)
    return (q, k, v, do), segments, causal, expected


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_equals_the_plain_formula(case, backend):
    (q, k, v, do), segments, causal, expected = case

    def compute(q, k, v):
        return SelfAttention(backend)(q, k, v, segments, causal=causal)

    assert_close(
        jax.jit(lambda *a: output_and_gradients(compute, *a))(q, k, v, do), expected, atol=2e-5
    )


@pytest.mark.parametrize("case", ["long_frame"], indirect=True)
@pytest.mark.parametrize("backend", ["auto", "splash_interpret"])
@pytest.mark.parametrize("copies", [1, 2])
def test_on_a_mesh_equals_the_plain_formula(case, backend, copies):
    """Rows over data and fsdp, heads over tensor.

    With one key head each device computes all heads.
    """
    (q, k, v, do), segments, causal, expected = case
    shardings = activation_shardings(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    attention = SelfAttention(backend, rows=shardings.rows, heads=shardings.heads)
    segments = np.tile(segments, (2, 1))

    def compute(q, k, v):
        return attention(q, k, v, segments, causal=causal)

    repeated = [np.tile(x, (2, 1, copies, 1)) for x in (q, k, v, do)]
    ours = jax.jit(lambda *a: output_and_gradients(compute, *a))(
        *jax.device_put(repeated, shardings.rows)
    )
    assert ours["out"].sharding.shard_shape(ours["out"].shape)[::2] == (1, q.shape[2])
    assert_close(
        ours, {name: np.tile(x, (2, 1, copies, 1)) for name, x in expected.items()}, atol=2e-5
    )


def test_the_compile_target_decides():
    """Without a mesh, and from this CPU: the kernel for TPUs, none for the others."""
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.float32)
    compute = jax.jit(lambda q: jax.grad(lambda q: SelfAttention()(q, q, q, causal=True).sum())(q))
    for platform, kernels in (("tpu", 2), ("cpu", 0), ("cuda", 0)):
        text = str(
            jax.export.export(compute, platforms=[platform], disabled_checks=ALLOW_TPU_KERNELS)(
                x
            ).mlir_module()
        )
        assert text.count("@tpu_custom_call") == kernels, platform


def test_the_devices_of_the_mesh_decide():
    shardings = activation_shardings(make_mesh(MeshConfig()))
    with pytest.raises(
        ConfigError,
        match="compute.attention is 'splash': .* of the platform cpu; set it to auto or xla",
    ):
        SelfAttention("splash", rows=shardings.rows, heads=shardings.heads).check(
            jnp.bfloat16, (64, 128)
        )
    with pytest.raises(ConfigError, match="compute.attention is 'cudnn': .* of the platform cpu"):
        SelfAttention("cudnn", rows=shardings.rows, heads=shardings.heads).check(
            jnp.bfloat16, (64, 128)
        )


def test_what_a_backend_cannot_do_is_named(tiny_model):
    for backend, dtype, head_dims, message in (
        ("flash", jnp.bfloat16, (64,), "'flash': choose one of auto, xla, splash"),
        ("cudnn", jnp.float32, (64,), "activations are float32.* set compute.dtype=bfloat16"),
        ("cudnn", jnp.bfloat16, (132,), "head_dim is 132.* set it to auto or xla"),
    ):
        with pytest.raises(ConfigError, match=message):
            SelfAttention(backend).check(dtype, head_dims)
    with pytest.raises(ConfigError, match="float32"):
        abstract_model(tiny_model, dtype="float32", attention="cudnn")


def test_blocks_divide_the_padded_length():
    for length in [*range(1, 700), *range(704, 20000, 64), 1025]:
        cut = blocks(length)
        assert length <= cut.padded <= max(1.25 * length, length + 256), cut
        assert cut.padded % cut.keys == cut.keys % cut.block == cut.block % LANES == 0, cut
        assert cut.block <= BLOCK and (cut.block >= 256 or cut.padded == cut.block), cut
        assert cut.padded // cut.keys <= DQ_PARTS, cut
    assert (
        blocks(1025) == (1152, 384, 384)
        and blocks(4096) == (4096, 512, 512)
        and blocks(8192) == (8192, 512, 1024)
    )


@pytest.fixture(scope="module")
def tiny_model():
    """LVTC with four low and sixteen high tokens a tile, a layer in each frame."""
    return ModelConfig(
        vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=32, image_size=56),
        decoder=DecoderConfig(
            vocab_size=50, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
        ),
        prompt=PromptConfig(tiles=TileConfig(tile_size=56)),
        lvtc=LvtcConfig(expand_layer=1, low_grid=2, high_grid=4, low_projector="mlp"),
    )


def lvtc_batch(config):
    """Two rows of two segments with a tile each, and padding behind them."""
    rng = np.random.default_rng(0)
    segments, tile_start = packed(2, 64, 30, 56), np.array([[4, 33], [3, 30]], np.int32)
    positions = np.where(
        segments == 2, np.arange(64) - (segments == 1).sum(axis=1, keepdims=True), np.arange(64)
    )
    return Inputs(
        rng.integers(8, 50, (2, 64)).astype(np.int32),
        positions.astype(np.int32),
        segments,
        rng.normal(size=(2, 2, 56, 56, 3)).astype(np.float32),
        feature_index(tile_start, 64, 16),
        short_layout(segments, tile_start, 40, config.lvtc),
    )


def test_the_model_has_equal_loss_and_gradients(tiny_model):
    inputs, results = lvtc_batch(tiny_model), {}
    rng = np.random.default_rng(1)
    params = {
        path: rng.normal(1.0 if "norm" in path else 0.0, 0.15, leaf.shape).astype(np.float32)
        for path, leaf in abstract_model(tiny_model, dtype="float32").shapes.items()
    }
    for backend in ("xla", "splash_interpret"):
        graphdef = abstract_model(tiny_model, dtype="float32", attention=backend).graphdef

        def loss(params):
            hidden = nnx.merge(graphdef, unflatten(params))(inputs)
            weight = (inputs.segment_ids > 0)[..., None] * np.cos(np.arange(32))
            return jnp.sum(weight * jnp.tanh(hidden)) / weight.size

        results[backend] = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(results["splash_interpret"][0], results["xla"][0], atol=1e-5)
    for path, expected in results["xla"][1].items():
        np.testing.assert_allclose(
            results["splash_interpret"][1][path], expected, atol=1e-4, err_msg=path
        )
    assert max(float(jnp.abs(x).max()) for x in results["xla"][1].values()) > 0.01
