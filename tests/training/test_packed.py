"""Packed rows in the model and in the loop (design: data.md 12, 14, 15)."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from internvlx_jax.core.data_config import FaultConfig
from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.run_config import ComputeConfig, MeshConfig
from internvlx_jax.data.pipeline import Loader
from internvlx_jax.data.processor import Processor
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER
from internvlx_jax.data.templates import get_template
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.params import abstract_model
from internvlx_jax.training.loop import train
from internvlx_jax.training.step import make_eval_step


def test_packed_rows_give_the_loss_of_the_samples_on_their_own(tiny, tiny_params, run_in, tmp_path):
    """Loss, weights and right answers of one pass do not depend on what shares a row."""
    config = run_in(tmp_path).data
    processor = Processor(
        Tokenizer.load(TOKENIZER_FOLDER),
        get_template("internlm2-chat"),
        None,
        tiny.prompt.tiles,
        tiny.tokens_per_tile,
    )
    step = jax.jit(make_eval_step(abstract_model(tiny, dtype="float32").graphdef))
    sums = {}
    for mode in ("tokens", "pack"):
        loader = Loader(
            config.meta,
            dataclasses.replace(
                config, batch_mode=mode, max_executables=1, loss_reduction="square"
            ),
            processor,
            row_quantum=1,
            seed=0,
            epochs=1,
        )
        sums[mode] = np.sum(
            [
                jax.device_get(step(tiny_params, loaded.batch))
                for loaded in loader.steps(0, loader.plan.total)
            ],
            axis=0,
        )
    np.testing.assert_allclose(sums["pack"], sums["tokens"], rtol=2e-5)
    assert sums["pack"][3] > 40, "answers"


@pytest.fixture(scope="module")
def faulty(pages):
    """The pages' meta file with a dataset more, of which one image in two cannot be decoded."""
    (pages / "empty.png").write_bytes(b"")
    lines = (pages / "synthetic_pages" / "train.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines if '"image": "' in line][:8]
    for line in lines[::2]:
        line["image"] = str(pages / "empty.png")
    (pages / "faulty.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {}]))
    entry = {"root": str(pages / "synthetic_pages"), "annotation": str(pages / "faulty.jsonl")}
    meta = json.loads((pages / FILES["meta_train"]).read_text()) | {"faulty": entry}
    path = pages / "meta_faulty.json"
    path.write_text(json.dumps(meta))
    return str(path)


def losses(config):
    rows = [
        json.loads(line)
        for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    return [row["loss"] for row in rows]


@pytest.mark.slow
def test_a_packed_run_with_bad_samples_goes_on_with_more_devices(tiny_run, faulty):
    """Rows come in eights, so that twice the data-parallel devices have the same steps."""
    config = tiny_run("straight", steps=4)
    data = dataclasses.replace(
        config.data,
        meta=faulty,
        batch_mode="pack",
        row_quantum=8,
        loss_reduction="square",
        tokens_per_step=2048,
        faults=FaultConfig(max_share=0.5),
    )
    straight = dataclasses.replace(config, data=data)
    final = train(straight)
    assert (
        final["bad_samples"] > 0
        and 0.5 < final["token_fill"] <= 1
        and 0 <= final["data_wait_share"] <= 1
    )

    halves = dataclasses.replace(straight, output_dir=tiny_run("halves").output_dir)
    train(halves, stop_after=2)
    wider = dataclasses.replace(halves, mesh=MeshConfig(data=2, fsdp=4, tensor=1))
    train(wider)
    np.testing.assert_allclose(losses(wider), losses(straight), rtol=1e-4)

    listed = [
        json.loads(line)
        for line in (Path(wider.output_dir) / "quarantine-0.jsonl").read_text().splitlines()
    ]
    places = [(row["dataset"], row["line"]) for row in listed]
    assert (
        places[0] == ("faulty", 9)
        and listed[0]["reason"] == "json"
        and len(set(places)) == len(places)
    )
    assert {line for _, line in places[1:]} <= {1, 3, 5, 7} and len(places) > 1

    with pytest.raises(ConfigError, match=r"multiples of 8 \(data.row_quantum\), which 16 parts"):
        train(
            dataclasses.replace(
                wider, compute=ComputeConfig(dtype="float32", remat="none", accumulation=2)
            )
        )
    strict = dataclasses.replace(data, faults=FaultConfig(max_share=0.001))
    with pytest.raises(ConfigError, match='dataset "faulty": 1 of 9 samples are bad'):
        train(dataclasses.replace(straight, data=strict, output_dir=tiny_run("strict").output_dir))
    assert not Path(tiny_run("strict").output_dir).exists(), "refused before anything is written"
