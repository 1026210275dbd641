"""Collectives and memory traffic read from compiled programs whose loops and sizes are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from internvlx_jax.aot.hlo import _first_group, moved
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.models.sharding import make_mesh

LOOPS = 5


@pytest.fixture(scope="module")
def scanned():
    """Five times: a gather over fsdp and a sum over tensor, as a compiled program for 8 devices."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spec = PartitionSpec("fsdp", None)

    def on_one_device(kernels, x):
        def body(x, kernel):
            kernel = jax.lax.all_gather(kernel, "fsdp", axis=0, tiled=True)
            return jax.lax.psum(jnp.tanh(x @ kernel), "tensor"), None

        return jax.lax.scan(body, x, kernels)[0]

    f = jax.shard_map(
        on_one_device,
        mesh=mesh,
        in_specs=(PartitionSpec(None, "fsdp"), spec),
        out_specs=spec,
        check_vma=False,
    )

    def struct(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    return (
        jax.jit(f)
        .lower(struct(LOOPS, 64, 64, spec=PartitionSpec(None, "fsdp")), struct(32, 64, spec=spec))
        .compile()
    )


def test_collectives_of_a_loop_count_as_often_as_it_runs(scanned):
    found = moved(scanned.as_text(), 8)
    assert found.unknown_loops == 0
    received = {
        kind: (
            sum(c.times for c in found.collectives if c.kind == kind),
            sum(c.times * c.received for c in found.collectives if c.kind == kind),
        )
        for kind in {c.kind for c in found.collectives}
    }
    assert received == {
        "all-gather": (LOOPS, LOOPS * 64 * 64 * 4 / 2),  # half of each kernel is there already
        "all-reduce": (LOOPS, LOOPS * 2 * 16 * 64 * 4 / 2),
    }  # a ring passes it twice, but for its own part
    assert {c.group for c in found.collectives if c.kind == "all-gather"} == {(0, 2)}
    assert {c.group for c in found.collectives if c.kind == "all-reduce"} == {(0, 1)}


def test_a_layer_is_read_not_the_whole_stack(scanned):
    """Each run of the body reads at least the gathered kernel, and far less than the stack."""
    traffic = moved(scanned.as_text(), 8).memory_bytes
    kernel = 64 * 64 * 4
    assert LOOPS * kernel < traffic < LOOPS * 12 * kernel


def test_traffic_of_a_product():
    a, b = (jax.ShapeDtypeStruct((256, 256), jnp.float32) for _ in range(2))
    traffic = moved(jax.jit(lambda a, b: a @ b).lower(a, b).compile().as_text(), 1).memory_bytes
    assert traffic == pytest.approx(3 * 256 * 256 * 4, rel=0.01)


@pytest.mark.parametrize(
    "notation, members",
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", (0, 2)),
        ("replica_groups=[2,4]<=[8], x", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", (0, 2, 4, 6)),
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], "
            "device_ids=([2,4]T(1,0)) {'axis_0'}, x",
            (0, 1, 2, 3),
        ),
        ("source_target_pairs={{3,0},{0,1}}", (3, 0)),
        ("channel_id=1", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_notations_of_device_groups(notation, members):
    assert _first_group(notation, 8) == members


def test_memory_that_is_not_main_memory_does_not_count():
    text = """
ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  %near = f32[1024]{0:T(1024)S(1)} copy(%p)
  ROOT %out = f32[1024]{0:T(1024)} negate(%near)
}
"""
    assert moved(text, 1).memory_bytes == 2 * 4096
