"""The tables of benchmarks/ablation.py: their rows, data and questions."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ablation_cells import (
    Asked,
    Cell,
    Stage,
    finished,
    merged_questions,
    model_of,
    run_cell,
    settings_hash,
    trained,
    write_start,
)
from ablation_easyvqa import (
    SPLITS,
    ImageRecipe,
    decoder_file,
    import_start,
    package_folder,
    train_image_tower,
    write_easyvqa,
)
from ablation_tower import TowerRecipe, train_tower

from internvlx_jax.core.errors import ConfigError
from internvlx_jax.core.overrides import load_config_file, override
from internvlx_jax.core.run_config import TrainConfig
from internvlx_jax.data.form_dataset import CONTROLS, FILES, FormConfig, generate_forms

PAGES, EASYVQA = "configs/ablation_pages.py", "configs/ablation_easyvqa.py"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Holds the data of a table.

    Attributes:
        asked: Test questions and controls.
        blind: Exact match of the best answerer that sees no image, by kind; on the control
            `blank` as overall, unless it has other questions.
    """

    asked: Asked
    blind: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Table:
    """Describes a table at one size.

    Attributes:
        name, preset: Of the table.
        variants: All rows, in order.
        core: Those of --quick.
        seeds: Of each row.
        stages: The runs of a cell, one after the other.
        baseline: The row that times are compared with.
        timed: Returns the run of a cell whose steps are timed, with any weights.
        prepare: Makes the data, or finds them.
        share: Makes the towers that cells begin with, or finds them.
        max_new_tokens: Longest answer.
        batch_size: Rows of a batch of questions.
    """

    name: str
    preset: str
    variants: tuple[str, ...]
    core: tuple[str, ...]
    seeds: tuple[int, ...]
    stages: Callable[[Cell], list[Stage]]
    baseline: str
    timed: Callable[[Cell], TrainConfig]
    prepare: Callable[[], Prepared]
    share: Callable[[Cell], None]
    max_new_tokens: int
    batch_size: int = 32

    def cell(self, variant: str, seed: int) -> Cell:
        """Names a cell of the table."""
        return Cell(self.name, self.preset, variant, seed)

    def finished(self, cell: Cell, results: Path) -> bool:
        """Returns whether a cell is kept already; see ablation_cells.finished."""
        return finished(cell, results, settings_hash(self.stages(cell)))

    def begin(self, cell: Cell) -> Prepared:
        """Makes what a cell shares with others, or finds it: data, towers, all runs but its last.

        Returns:
            The data.
        """
        data = self.prepare()
        self.share(cell)
        for stage in self.stages(cell)[:-1]:
            trained(stage)
        return data

    def run(self, cell: Cell, results: Path) -> dict[str, Any]:
        """Runs a cell, keeps and returns it."""
        data = self.begin(cell)
        return run_cell(
            cell,
            self.stages(cell),
            data.asked,
            results=results,
            blind=data.blind,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )


def _known_preset(source: str, preset: str) -> dict[str, Any]:
    """Runs a config file and returns what it defines."""
    defined = runpy.run_path(source)
    if preset not in defined["PRESETS"]:
        raise ConfigError(f"preset {preset!r} is unknown; choose {', '.join(defined['PRESETS'])}")
    return defined


def _rows(defined: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a table that its config file defines."""
    return {
        "variants": tuple(defined["VARIANTS"]),
        "core": defined["CORE"],
        "seeds": defined["SEEDS"],
        "baseline": defined["BASELINE"],
    }


def pages(preset: str, runs: Path) -> Table:
    """Returns table A."""
    defined = _known_preset(PAGES, preset)
    data, group = runs / "data" / f"pages-{preset}", runs / f"pages-{preset}"
    size = defined["PRESETS"][preset]

    def recipe(cell: Cell) -> TowerRecipe:
        return TowerRecipe(*size.tower, seed=1 + cell.seed)

    def tower(cell: Cell) -> Path:
        return group / f"tower-s{cell.seed}.npz"

    def share(cell: Cell) -> None:
        train_tower(model_of(stages(cell)[-1].config).vision, recipe(cell), tower(cell))

    def stages(cell: Cell) -> list[Stage]:
        name = f"{cell.variant}-s{cell.seed}"
        source = f"{PAGES}:variant={cell.variant},seed={cell.seed},preset={preset}"
        decoder = group / f"decoder-s{cell.seed}"
        words = {
            "output_dir": decoder,
            "data.meta": data / FILES["meta_text"],
            "data.index_dir": runs / "index",
        }
        places = {
            "output_dir": group / name,
            "init_from": group / f"start-{name}",
            "data.meta": data / FILES["meta_train"],
            "data.val_meta": data / FILES["meta_val"],
            "data.index_dir": runs / "index",
        }
        row = _placed(source, places)
        return [
            Stage(_placed(f"{source},stage=decoder", words)),
            Stage(
                row,
                before=lambda: write_start(row, tower(cell), decoder),
                begins_with=dataclasses.asdict(recipe(cell)),
            ),
        ]

    return Table(
        name="pages",
        preset=preset,
        **_rows(defined),
        stages=stages,
        timed=lambda cell: dataclasses.replace(stages(cell)[-1].config, init_from=None),
        prepare=functools.partial(_forms, data, size.forms, size.texts),
        share=share,
        max_new_tokens=5,
    )


def _forms(folder: Path, counts: tuple[int, int, int, int], texts: int) -> Prepared:
    """Generates the forms, or finds them."""
    summary = generate_forms(folder, FormConfig(0, *counts, text=texts))
    splits = {"test": FILES["test"], **{name: FILES[name] for name in CONTROLS}}
    out = folder / "forms" / "asked.jsonl"
    paths = {split: folder / path for split, path in splits.items()}
    return Prepared(merged_questions(paths, "field", out), summary["chance"])


def easyvqa(
    preset: str, runs: Path, *, images: Path | None = None, llm: Path | None = None
) -> Table:
    """Returns table B.

    Args:
        preset: A size that its config file knows.
        runs: Folder of data and run folders.
        images: easy-VQA's folder `data`; None is that of the installed package.
        llm: Folder or GGUF file of the decoder; None is that of the installed package.
    """
    defined = _known_preset(EASYVQA, preset)
    data, group = runs / "data" / f"easyvqa-{preset}", runs / f"easyvqa-{preset}"
    size = defined["PRESETS"][preset]
    chats = {"questions": size.questions, "blank_every": size.blank_every}

    def source() -> Path:
        return images or package_folder("easy_vqa") / "data"

    def share(cell: Cell) -> None:
        (stage,) = stages(cell)
        kind, tower = defined["VARIANTS"][cell.variant].projector, group / f"vit-s{cell.seed}"
        train_image_tower(model_of(stage.config), source(), recipe(cell), tower)
        file = llm or decoder_file()
        start = Path(str(stage.config.init_from))
        import_start(tower, file, kind, start, cell.seed, tiny=preset == "tiny")

    def stages(cell: Cell) -> list[Stage]:
        kind, seed = defined["VARIANTS"][cell.variant].projector, cell.seed
        places = {
            "output_dir": group / f"{cell.variant}-s{seed}",
            "init_from": group / f"start-{kind}-s{seed}",
            "data.meta": data / "meta_train.json",
            "data.val_meta": data / "meta_val.json",
            "data.index_dir": runs / "index",
        }
        row = _placed(f"{EASYVQA}:variant={cell.variant},seed={seed},preset={preset}", places)
        return [Stage(row, begins_with=dataclasses.asdict(recipe(cell)) | chats)]

    def timed(cell: Cell) -> TrainConfig:
        share(cell)  # the tokenizer comes with the decoder
        return stages(cell)[-1].config

    def recipe(cell: Cell) -> ImageRecipe:
        return ImageRecipe(*size.tower, images=size.images[0], seed=cell.seed)

    def prepare() -> Prepared:
        found = write_easyvqa(source(), data, images=size.images, **chats)
        paths = {split: data / path for split, path in SPLITS.items()}
        return Prepared(merged_questions(paths, "kind", data / "asked.jsonl"), found["chance"])

    return Table(
        name="easyvqa",
        preset=preset,
        **_rows(defined),
        stages=stages,
        timed=timed,
        prepare=prepare,
        share=share,
        max_new_tokens=5,
        batch_size=64,
    )


def _placed(source: str, places: Mapping[str, Path]) -> TrainConfig:
    """Returns a config with its files elsewhere."""
    return override(load_config_file(source), [f"{k}={v}" for k, v in places.items()])


TABLES = {"pages": pages, "easyvqa": easyvqa}


def open_table(name: str, preset: str, runs: Path, **places: Path | None) -> Table:
    """Opens a table by its name.

    Args:
        name: `pages` or `easyvqa`.
        preset: A size that its config file knows.
        runs: Folder of data and run folders.
        places: Where easy-VQA's files lie; see `easyvqa`.

    Raises:
        ConfigError: The preset is unknown.
    """
    return easyvqa(preset, runs, **places) if name == "easyvqa" else pages(preset, runs)


def rows_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]:
    """Returns the rows of a table, those of its core, and the seeds of each."""
    defined = runpy.run_path({"pages": PAGES, "easyvqa": EASYVQA}[name])
    return tuple(defined["VARIANTS"]), defined["CORE"], defined["SEEDS"]
