"""The examples, the notebook and the README's answer run as they stand, on a tiny random model."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from internvlx_jax.checkpoints.run_writer import CheckpointWriter, write_run_folder
from internvlx_jax.core.model_config import (
    DecoderConfig,
    ModelConfig,
    PromptConfig,
    VisionConfig,
)
from internvlx_jax.core.overrides import to_dict
from internvlx_jax.core.tile_config import TileConfig
from internvlx_jax.data.synthetic import FILES, TOKENIZER_FOLDER, SyntheticConfig, generate
from internvlx_jax.data.tokenizer import Tokenizer
from internvlx_jax.models.params import init_params

ROOT = Path(__file__).parents[1]
MODEL = ModelConfig(
    vision=VisionConfig(width=16, layers=1, heads=2, mlp_width=16, image_size=56),
    decoder=DecoderConfig(
        vocab_size=656, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=32
    ),
    prompt=PromptConfig(system_message="", tiles=TileConfig(tile_size=56, max_num=2)),
)


def example(name):
    """Returns the module of one example."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder like the checkout after `make demo`, with a model that knows nothing."""
    folder = tmp_path_factory.mktemp("workplace")
    demo = folder / "runs" / "demo"
    generate(demo / "data", SyntheticConfig(train_samples=24, val_samples=8))
    settings = {"train": {}, "model": to_dict(MODEL)}
    write_run_folder(demo / "train", settings, Tokenizer.load(TOKENIZER_FOLDER))
    params = jax.tree.map(np.asarray, init_params(MODEL, 0))
    with CheckpointWriter(demo / "train", keep_last=1) as writer:
        arrays = jax.tree.map(jax.numpy.asarray, params)
        writer.save(1, arrays, {"count": jax.numpy.int32(1)}, settings)
    Image.new("RGB", (100, 60), "white").save(folder / "page.png")
    return folder


def test_caption(workplace):
    text = example("caption").main(str(workplace / "runs/demo/train"), str(workplace / "page.png"))
    assert isinstance(text, str)


@pytest.mark.slow
def test_finetune_and_resume(workplace, tmp_path):
    train = example("finetune").main
    data = workplace / "runs/demo/data/synthetic_pages/train.jsonl"
    arguments = str(workplace / "runs/demo/train"), str(data), str(tmp_path)
    metrics = train(*arguments, steps=2)
    assert np.isfinite(metrics["loss"])
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    train(*arguments, steps=2)  # a finished run has nothing left to do


def test_convert_both_ways(golden, tmp_path):
    parameters, tensors = example("convert").main(str(golden / "internlm2"), str(tmp_path))
    assert parameters > 20 and tensors > parameters


def test_evaluate(workplace, tmp_path):
    questions = workplace / "runs/demo/data" / FILES["val_vqa"]
    score = example("evaluate").main(
        str(workplace / "runs/demo/train"), str(questions), str(tmp_path)
    )
    assert 0 <= score <= 1
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) >= 8


def test_the_readme_answers(workplace, monkeypatch):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 5
    monkeypatch.chdir(workplace)
    names = {}
    exec(block, names)
    assert isinstance(names["answer"], str)


def test_the_notebook(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None
            exec("".join(cell["source"]), names)
    assert len(names["answers"]) == 8 and all(isinstance(each, str) for each in names["answers"])
    assert isinstance(names["second"], str)
