"""The engine answers each request as if it were alone, whatever comes and goes beside it."""

import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import internvlx_jax as ivx
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.generation_config import Sampling
from internvlx_jax.core.model_config import LvtcConfig
from internvlx_jax.core.run_config import MeshConfig
from internvlx_jax.inference.arguments import make_request, make_spec
from internvlx_jax.inference.engine import Closed, Engine, QueueFull
from internvlx_jax.models.generation import choose, row_keys
from internvlx_jax.models.serving_slots import RowSampling, choose_for_rows
from internvlx_jax.models.sharding import make_mesh

SMALL = {"slots": 3, "capacity": 256, "max_tiles": 2}


@pytest.fixture(scope="module")
def engine(model):
    engine = model.engine(**SMALL)
    engine.start()
    yield engine
    engine.close()


def requests(count: int, *, sampled: bool = True) -> list[tuple]:
    """Prompts of mixed lengths, images and options."""
    rng = np.random.default_rng(0)
    options = [{}, {"stop": "e"}]
    if sampled:
        options = [{}, {"stop": "e", "repetition_penalty": 1.3}, {"temperature": 0.9, "top_k": 9}]
    made = []
    for i in range(count):
        pages = [rng.integers(0, 255, (60, 80, 3), np.uint8) for _ in range(i % 3)]
        text = f"Question {i}? " + "word " * int(rng.integers(0, 20))
        own = options[i % len(options)] | {"max_new_tokens": (3, 40, 17)[i % 3]}
        made.append((text, pages, own | ({"seed": i} if "temperature" in own else {})))
    return made


def ask(engine: Engine, text, pages, options) -> tuple[str, object]:
    spec = make_spec(engine.prompts.processor.tiles, **options)
    pieces = list(engine.answer(make_request(text, pages), spec))
    return "".join(piece.text for piece in pieces), pieces[-1].answer


def test_neighbors_change_nothing(engine, model):
    asked = requests(18)
    alone = [model.generate(text, pages, **options) for text, pages, options in asked]
    one_by_one = [ask(engine, *each)[0] for each in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(lambda each: ask(engine, *each), asked))
    assert one_by_one == alone
    assert [text for text, _ in together] == alone
    assert len(set(alone)) > 12, "the answers tell requests apart"
    for (_, _, options), (text, answer) in zip(asked, together, strict=True):
        assert answer.text == text and answer.error is None
        assert answer.finish == "stop" or answer.new_tokens == options["max_new_tokens"]
    state = engine.state()
    assert (state.busy, state.waiting, state.compiles) == (0, 0, 0)


def test_two_caches_of_lvtc(run_folder):
    """Shallow and deep layers hold prompts of different lengths."""
    lvtc = LvtcConfig(expand_layer=1, low_grid=2, high_grid=4)
    model = ivx.load(run_folder, dtype="float32", lvtc=lvtc)
    asked = requests(6, sampled=False)
    assert answered(model, asked) == [
        model.generate(text, pages, **options) for text, pages, options in asked
    ]


def test_devices_share_heads(run_folder, model):
    mesh = make_mesh(MeshConfig(tensor=2), jax.devices()[:2])
    sharded = ivx.load(run_folder, dtype="float32", mesh=mesh)
    asked = requests(4, sampled=False)
    assert answered(sharded, asked) == [
        model.generate(text, pages, **options) for text, pages, options in asked
    ]
    with pytest.raises(ConfigError, match=r"share no rows; set mesh\.data and mesh\.fsdp to 1"):
        ivx.load(run_folder, mesh=make_mesh(MeshConfig())).engine()


def answered(model: ivx.VLM, asked: list[tuple]) -> list[str]:
    """Asks all at the same time, and checks that nothing was compiled on the way."""
    engine = model.engine(**SMALL)
    engine.start()
    try:
        with ThreadPoolExecutor(len(asked)) as pool:
            texts = list(pool.map(lambda each: ask(engine, *each)[0], asked))
        assert engine.state().compiles == 0
        return texts
    finally:
        engine.close()


def test_rows_choose_as_a_batch_does():
    """Each row by its own sampling, equal to `choose` with that sampling for all rows."""
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(0, 3, (6, 50)), jnp.float32).at[:, :4].set(1.5)
    keys, step = row_keys(7, jnp.arange(6)), 3
    kinds = [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.5, top_k=5),
        Sampling(temperature=1.0, top_p=0.6),
        Sampling(temperature=0.9, top_k=30, top_p=0.9),
        Sampling(temperature=2.0, top_k=1),
    ]
    rows = RowSampling(
        *(
            jnp.array([getattr(kind, field) for kind in kinds])
            for field in ("temperature", "top_k", "top_p", "repetition_penalty")
        ),
        keys,
    )
    none = jnp.zeros(logits.shape, bool)
    for seed in range(20):
        rows = rows._replace(keys=row_keys(seed, jnp.arange(6)))
        found = choose_for_rows(logits, none, jnp.full((6,), step), rows)
        wanted = [choose(logits, rows.keys, step, kind)[i] for i, kind in enumerate(kinds)]
        assert found.tolist() == [int(token) for token in wanted]


def test_a_client_that_leaves_frees_its_slot(engine):
    spec = make_spec(engine.prompts.processor.tiles, max_new_tokens=200)
    before = engine.state()
    for _ in range(2 * SMALL["slots"]):
        answer = engine.answer(make_request("Go on."), spec)
        next(answer)
        answer.close()
    wait_until(lambda: engine.state().busy == 0)
    assert engine.state().cancelled - before.cancelled == 2 * SMALL["slots"]
    assert ask(engine, "And now?", [], {"max_new_tokens": 3})[0]


def test_what_cannot_be_answered(engine):
    tiles = engine.prompts.processor.tiles
    page = np.zeros((20, 20, 3), np.uint8)

    def error(text, images=None, **options):
        spec = make_spec(tiles, **({"max_new_tokens": 5} | options))
        (piece,) = engine.answer(make_request(text, images), spec)
        return str(piece.answer.error)

    assert "3 tiles, this server takes 2" in error("All?", [page] * 3)
    assert "a slot of this server holds 256" in error("word " * 300)
    assert "has 100000 characters, a slot of this server holds 256" in error("x" * 100_000)
    assert "cannot be read" in error("This?", [b"no image"])
    text, answer = ask(engine, "word " * 100, [], {"max_new_tokens": 10_000})
    assert answer.finish == "stop" or answer.prompt_tokens + answer.new_tokens == 256


def test_a_queue_has_an_end(model):
    engine = model.engine(**SMALL | {"waiting": 2})
    spec = make_spec(engine.prompts.processor.tiles, max_new_tokens=5)
    pieces = []
    for _ in range(5):  # three slots and two that wait; nothing runs yet
        engine.submit(make_request("Next?"), spec, pieces.append)
    with pytest.raises(QueueFull):
        engine.submit(make_request("Next?"), spec, pieces.append)
    engine.start()
    engine.close()  # answers what it has
    assert sum(piece.answer is not None for piece in pieces) == 5
    with pytest.raises(Closed):
        engine.submit(make_request("Next?"), spec, pieces.append)


def test_a_fault_ends_its_requests_only(model, monkeypatch):
    engine = model.engine(**SMALL)
    engine.start()
    decode, faults = engine._decode, iter([True])

    def broken(*args):
        if next(faults, False):
            raise RuntimeError("out of memory")
        return decode(*args)

    broken._cache_size = decode._cache_size
    monkeypatch.setattr(engine, "_decode", broken)
    spec = make_spec(engine.prompts.processor.tiles, max_new_tokens=5)
    *_, last = engine.answer(make_request("First?"), spec)
    assert last.fault and last.answer is None and engine.state().failed == 1
    assert ask(engine, "Second?", [], {"max_new_tokens": 5})[0] == model.generate(
        "Second?", max_new_tokens=5
    )
    engine.close()


def wait_until(true, seconds: float = 20):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
