"""Tables and picture of the ablation, made from the stored cells, for benchmarks/ablation.py.

Every number of docs/evidence.md stands in a block that this file writes.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ablation_cells import Cell
from ablation_tables import rows_of

from internvlx_jax.core.files import write_text, written_aside
from internvlx_jax.core.json_text import read_json_object
from internvlx_jax.training.report import figure_class

PAGES, PICTURE = (Path("docs/evidence.md"), Path("README.md")), Path("docs/evidence.png")
GROUPS = (("pages", "cpu"), ("pages", "gpu"), ("easyvqa", "cpu"), ("easyvqa", "gpu"))
BLOCK = re.compile(r"(<!-- begin (\S+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
MISSING = "–"
REPEATED = "repeated"  # folder with cells that are there already and were made once more

COLORS = {"mlp1": "#8a94a6", "pvtc": "#1f5fbf", "lvtc": "#b3541e"}
LABELS = {"mlp1": "mlp1", "pvtc": "PVTC", "lvtc": "PVTC and LVTC"}


class Pair(NamedTuple):
    """A comparison of two rows that differ in one factor.

    Attributes:
        question: What is compared.
        row: The row with the factor.
        against: The row without it.
    """

    question: str
    row: str
    against: str


PAIRS: Mapping[str, Sequence[Pair]] = {
    "pages": (
        Pair("whole: InternVL-X against InternVL", "x", "internvl"),
        Pair("PVTC against mlp1, 4 tokens", "pvtc-4", "mlp1-4"),
        Pair("PVTC against mlp1, 16 tokens", "pvtc-16", "mlp1-16"),
        Pair("PVTC against mlp1, 64 tokens", "pvtc-64", "mlp1-64"),
        Pair("LVTC 4 to 16 against 16 in all layers", "x", "pvtc-16"),
        Pair("LVTC 4 to 16 against 4 in all layers", "x", "pvtc-4"),
        Pair("LVTC 16 to 64 against 64 in all layers", "paper", "pvtc-64"),
        Pair("LVTC 16 to 64 against 16 in all layers", "paper", "pvtc-16"),
        Pair("LVTC 4 to 16: with an injection", "x-inject", "x"),
        Pair("LVTC 16 to 64: with an injection", "paper-inject", "paper"),
        Pair("LVTC 4 to 16: expanded before layer 2", "x-k2", "x"),
        Pair("LVTC 4 to 16: gate starts at 0", "x-gate0", "x"),
        Pair("LVTC 4 to 16: no gate", "x-no-gate", "x"),
        Pair("LVTC 4 to 16: nearest instead of bilinear", "x-nearest", "x"),
        Pair("RVTC edge against off, mlp1", "mlp1-16", "internvl"),
        Pair("RVTC edge against off, PVTC", "pvtc-16", "pvtc-16-off"),
        Pair("RVTC area against off, PVTC", "pvtc-16-area", "pvtc-16-off"),
        Pair("RVTC area against edge, PVTC", "pvtc-16-area", "pvtc-16"),
    ),
    "easyvqa": (
        Pair("PVTC against mlp1", "pvtc", "mlp1"),
        Pair("LVTC fast against PVTC in all layers", "x-fast", "pvtc"),
        Pair("LVTC paper against PVTC in all layers", "x-paper", "pvtc"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """Holds the finished cells of a table at one size.

    Attributes:
        table, preset: Of the table.
        rows: All its rows.
        core: Those of --quick.
        seeds: The seeds of each.
        cells: Finished cells by row and seed.
        measured: Times and memory by row, where they were measured.
    """

    table: str
    preset: str
    rows: tuple[str, ...]
    core: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[int, Mapping[str, Any]]]
    measured: Mapping[str, Mapping[str, float]]

    @classmethod
    def read(cls, results: Path, table: str, preset: str) -> Group:
        """Reads what is kept."""
        rows, core, seeds = rows_of(table)
        cells = {}
        for row in rows:
            paths = {seed: Cell(table, preset, row, seed).file(results) for seed in seeds}
            found = {seed: read_json_object(path) for seed, path in paths.items()}
            cells[row] = {seed: cell for seed, cell in found.items() if cell}
        measured = read_json_object(results / f"{table}-{preset}" / "measured.json")
        return cls(table, preset, rows, core, seeds, cells, measured.get("rows", {}))

    @property
    def name(self) -> str:
        """Name in blocks and files."""
        return f"{self.table}-{self.preset}"

    @property
    def kinds(self) -> list[str]:
        """Kinds of questions, in the order of the first cell."""
        return next((list(cell["scores"]["test"])[1:] for cell in self.all), [])

    @property
    def all(self) -> list[Mapping[str, Any]]:
        """The finished cells."""
        return [cell for by_seed in self.cells.values() for cell in by_seed.values()]

    def scores(
        self, row: str, split: str = "test", kind: str = "all", seeds: Sequence[int] = ()
    ) -> list[float]:
        """Returns a score of a row by seed, or with some seeds, in percent."""
        cells = self.cells[row]
        return [100 * cells[seed]["scores"][split][kind] for seed in seeds or cells]

    def cost(self, row: str) -> Mapping[str, Any]:
        """Returns the cost of a row, which does not depend on the seed."""
        return next(iter(self.cells[row].values()))["cost"]


def spread(values: Sequence[float], sign: str = "") -> str:
    """Returns mean and standard deviation."""
    mean = f"{statistics.fmean(values):{sign}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_table(group: Group) -> str:
    """Returns cost and exact match of each row."""
    header = ["row", "tiles", "tokens, shallow", "tokens, deep", "tokens, mean", "GFLOP"]
    header += ["train step", "prefill", "peak memory, MiB", "exact match, %", "seeds"]
    rows = []
    for row in group.rows:
        if not group.cells[row]:
            continue
        cost, times = group.cost(row), group.measured.get(row, {})
        rows.append(
            [
                f"`{row}`",
                *(f"{cost[name]:.1f}" for name in ("tiles", "shallow", "deep", "tokens")),
                f"{cost['gflop']['total']:.3g}",
                *(f"{times[n]:.2f}" if n in times else MISSING for n in ("train", "prefill")),
                f"{times['peak_mib']:.0f}" if "peak_mib" in times else MISSING,
                spread(group.scores(row)),
                f"{len(group.cells[row])}",
            ]
        )
    return markdown(header, rows)


def kinds_table(group: Group) -> str:
    """Returns exact match by kind of question, and the controls."""
    controls = [name for name in group.all[0]["scores"] if name != "test"]
    rows = [
        [
            f"`{row}`",
            *(spread(group.scores(row, "test", kind)) for kind in group.kinds),
            *(spread(group.scores(row, control)) for control in controls),
        ]
        for row in group.rows
        if group.cells[row]
    ]
    blind = group.all[0]["blind"]
    by_kind = [f"{100 * blind[kind]:.1f}" for kind in group.kinds]
    rows.append(["without the image", *by_kind, f"{100 * blind.get('blank', blind['all']):.1f}"])
    rows[-1] += [""] * (len(controls) - 1)
    return markdown(["row", *group.kinds, *controls], rows)


def pairs_table(group: Group) -> str:
    """Returns what each factor does, seed by seed where both rows have it."""
    rows = []
    for pair in PAIRS[group.table]:
        first, second = group.cells[pair.row], group.cells[pair.against]
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            rows.append([pair.question, MISSING, MISSING, "0"])
            continue
        pairs = [(first[seed], second[seed]) for seed in seeds]
        scores = [[cell["scores"]["test"]["all"] for cell in pair] for pair in pairs]
        gains = [100 * (with_factor - without) for with_factor, without in scores]
        flops = [group.cost(row)["gflop"]["total"] for row in (pair.row, pair.against)]
        rows.append(
            [pair.question, spread(gains, "+"), f"{flops[0] / flops[1] - 1:+.0%}", str(len(seeds))]
        )
    return markdown(["factor", "exact match, points", "forward FLOPs", "seeds"], rows)


def repeated_table(group: Group, again: Group) -> str:
    """Returns the rows that were made another time, beside what they had with the same seeds."""
    rows, deviations = [], []
    for row in group.rows:
        first = group.scores(row)
        if len(first) > 1:
            deviations.append(statistics.variance(first))
        if seeds := sorted(group.cells[row].keys() & again.cells[row].keys()):
            same, second = group.scores(row, seeds=seeds), again.scores(row, seeds=seeds)
            gain = statistics.fmean(second) - statistics.fmean(same)
            numbers = [spread(first), ", ".join(map(str, seeds)), spread(same), spread(second)]
            rows.append([f"`{row}`", *numbers, f"{gain:+.1f}"])
    if not rows:
        return "No row is repeated."
    header = ["row", "exact match, %", "seeds", "with these seeds", "repeated", "difference"]
    text = markdown(header, rows)
    if deviations:
        of_all = statistics.fmean(deviations) ** 0.5
        text += f"\n\nStandard deviation of the seeds, over all rows: {of_all:.1f} points."
    return text


def state(group: Group) -> str:
    """Returns how complete the table is, and what a cell costs."""
    wanted = [(row, seed) for row in group.rows for seed in group.seeds]
    missing = [
        f"`{row}` {', '.join(f's{seed}' for seed in left)}"
        for row in group.rows
        if (left := [seed for seed in group.seeds if seed not in group.cells[row]])
    ]
    lines = [f"{len(group.all)} of {len(wanted)} cells are finished."]
    if missing and group.all:
        lines.append(f"Not finished: {'; '.join(missing)}.")
    if group.all:
        cell = group.all[0]
        counts = ", ".join(f"{n['all']:,} {split}" for split, n in cell["counts"].items())
        recipe = "; ".join(
            f"{_beginning(r)}{r['steps']} steps of {r['samples_per_step']} conversations, "
            f"learning rate {r['learning_rate']:g} ({r['schedule']}), {r['dtype']}"
            for r in cell["recipe"]
        )
        software = "; ".join(
            dict.fromkeys(
                ", ".join(f"{name} {version}" for name, version in cell["software"].items())
                for cell in group.all
            )
        )
        lines.append(f"Training: {recipe}. Questions: {counts}. {software}. {_cost(group)}")
        lines += _other_beginnings(group)
    if not group.measured:
        lines.append(f"Times and memory are not measured ({MISSING}).")
    return "\n".join(lines)


def _beginning(recipe: Mapping[str, Any]) -> str:
    """Returns what comes before a run, if anything does."""
    made = recipe.get("begins_with")
    if not made:
        return ""
    return f"tower {made['steps']:,} steps of {made['tiles']} tiles; "


def _other_beginnings(group: Group) -> list[str]:
    """Names the cells whose first runs, which all rows of a seed share, were trained another time.

    With equal settings these differ from machine to machine, because sums are rounded in another
    order. Their curves tell them apart.
    """
    others = []
    for seed in group.seeds:
        shared: dict[str, list[str]] = {}
        for row, by_seed in group.cells.items():
            if seed in by_seed:
                curves = json.dumps(by_seed[seed]["curves"][:-1])
                shared.setdefault(curves, []).append(f"`{row}` s{seed}")
        others += sorted(shared.values(), key=len, reverse=True)[1:]
    return [
        f"Began with another training of what rows share, at equal settings: {', '.join(cells)}."
        for cells in others
    ]


def _cost(group: Group) -> str:
    """Returns what cells took that were not interrupted."""
    taken = [cell["cpu_seconds"] / 60 for cell in group.all if cell["cpu_seconds"]]
    if not taken:
        return ""
    return f"A cell took {min(taken):.1f} to {max(taken):.1f} minutes of CPU time."


def picture(group: Group, link: str) -> str:
    """Returns the link to the picture; there is none without the rows of the core."""
    if not all(group.cells[row] for row in group.core):
        return ""
    return f"![Exact match against forward FLOPs of the variants]({link})"


def blocks(groups: Sequence[Group], repeated: Sequence[Group]) -> dict[str, str]:
    """Returns the text of each block by its name."""
    made = {}
    for group, again in zip(groups, repeated, strict=True):
        makers = {"main": main_table, "kinds": kinds_table, "pairs": pairs_table}
        for name, make in makers.items():
            made[f"{group.name}-{name}"] = make(group) if group.all else "No cell is finished."
        made[f"{group.name}-repeated"] = repeated_table(group, again)
        made[f"{group.name}-state"] = state(group)
        made[f"{group.name}-picture"] = picture(group, PICTURE.name)
        made[f"{group.name}-readme"] = picture(group, PICTURE.as_posix())
    return made


def filled(page: str, made: Mapping[str, str]) -> str:
    """Returns a page with the text of its blocks replaced."""

    def fill(found: re.Match[str]) -> str:
        text = made[found[2]]
        return f"{found[1]}\n{text}\n\n{found[3]}" if text else found[1] + found[3]

    return BLOCK.sub(fill, page)


def draw(group: Group, out: Path) -> None:
    """Draws exact match against forward FLOPs, one point per row, with the spread of the seeds."""
    figure = figure_class()(figsize=(7.6, 4.6), dpi=130, layout="constrained")
    axes = figure.subplots()
    for row in group.rows:
        if not group.cells[row]:
            continue
        values, flops = group.scores(row), group.cost(row)["gflop"]["total"]
        kind = "mlp1" if row.startswith(("mlp1", "internvl")) else "pvtc"
        kind = "lvtc" if row.startswith(("x", "paper")) else kind
        error = statistics.stdev(values) if len(values) > 1 else 0
        mean = statistics.fmean(values)
        style = dict(fmt="o", capsize=2, markersize=5, elinewidth=1)
        axes.errorbar(flops, mean, error, color=COLORS[kind], **style)
        # On two sides, as the rows of `mlp1` lie left below those of PVTC.
        place = dict(xytext=(-5, -11), ha="right") if kind == "mlp1" else dict(xytext=(5, 4))
        place |= dict(textcoords="offset points", fontsize=8)
        axes.annotate(row, (flops, mean), color=COLORS[kind], **place)
    for kind, label in LABELS.items():
        axes.plot([], [], "o", color=COLORS[kind], markersize=5, label=label)
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    if group.all:
        blind = 100 * group.all[0]["blind"]["all"]
        note = f"without the image {blind:.1f}"
        axes.annotate(
            note, (1, 0), (-4, 4), "axes fraction", "offset points", ha="right", fontsize=8
        )
    axes.margins(0.12)
    axes.set_xlabel("forward GFLOP per question")
    axes.set_ylabel("exact match, %")
    axes.grid(color="#e3e6eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with written_aside(out) as aside:
        figure.savefig(aside, format="png")


def report(results: Path, *, check: bool) -> int:
    """Writes the pages and the picture, or compares the pages.

    Returns:
        Exit status, 1 if `check` finds another page than the cells make.
    """
    groups = [Group.read(results, *each) for each in GROUPS]
    repeated = [Group.read(results / REPEATED, *each) for each in GROUPS]
    made = blocks(groups, repeated)
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES if path.is_file()}
    new = {path: filled(page, made) for path, page in pages.items()}
    differing = [str(path) for path in pages if new[path] != pages[path]]
    if check:
        for path in differing:
            print(f"{path} differs: run python benchmarks/ablation.py report")
        if not differing:
            print("the pages are what the cells make")
        return int(bool(differing))
    for path, page in new.items():
        write_text(path, page)
    print(f"wrote {', '.join(map(str, pages))}")
    if made[f"{groups[0].name}-picture"]:
        draw(groups[0], PICTURE)
        print(f"drew {PICTURE}")
    return 0
