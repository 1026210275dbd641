"""A comparison on one page that stands alone, with the questions that models disagree about.

(design: evaluation.md 12) Nothing here imports jax.
"""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

from PIL import Image, ImageOps

from internvlx_jax.core.errors import ConfigError, SampleError
from internvlx_jax.core.files import write_text
from internvlx_jax.data.images import load_image
from internvlx_jax.evaluation.compare import Comparison, Disagreement, Entry
from internvlx_jax.evaluation.compare_tables import (
    csv_text,
    difference_text,
    legend,
    markdown,
    score_text,
)
from internvlx_jax.evaluation.records import Row
from internvlx_jax.evaluation.stored_images import StoredImages

SIDE = 320  # longest side of a picture in px
MAX_IMAGES = 4  # of one question; the page says how many are left out
MAX_TEXT = 1500  # characters of a text that are shown
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:78rem;margin:2rem auto;
padding:0 1rem;color:#1d2430}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2.5rem}
table{border-collapse:collapse;font-size:.85rem}
td,th{border-bottom:1px solid #e3e6eb;padding:.25rem 1rem .25rem 0;text-align:left;
vertical-align:top}
.wide{overflow-x:auto}.better{color:#1a7f4b}.worse{color:#b3261e}small,.gray{color:#667085}
article{border:1px solid #cfd4dd;border-radius:6px;padding:.8rem 1rem;margin:.8rem 0;
display:flex;gap:1rem;flex-wrap:wrap}
article div.text{flex:1 1 24rem;min-width:0}
img{max-width:320px;height:auto;border:1px solid #e3e6eb}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2rem 0 .6rem;font:inherit}"""


def write_comparison(folder: Path, comparison: Comparison, *, worst: int) -> list[Path]:
    """Writes comparison.md, comparison.csv and comparison.html, each complete or not at all.

    Args:
        folder: receives the files; made if it does not exist.
        comparison: what to write.
        worst: disagreements shown of each task and model.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.md": markdown(comparison),
        "comparison.csv": csv_text(comparison),
        "comparison.html": page(comparison, worst=worst),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def page(comparison: Comparison, *, worst: int) -> str:
    """Returns the page as HTML with all images inside."""
    images = _Pictures()
    disagreements = comparison.disagreements(worst)
    cards = [_card(each, images) for each in disagreements]
    title = "Comparison of " + ", ".join(comparison.models)
    missing = (
        f"<p>{len(images.problems)} images could not be read; each place says why.</p>"
        if images.problems
        else ""
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>{_table(comparison)}"
        f"<p>{html.escape(legend(comparison))}</p>"
        f"<h2>Largest disagreements: {len(cards)}</h2>{missing}{''.join(cards)}</html>\n"
    )


def _table(comparison: Comparison) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in comparison.models)
    body = ""
    for cell in comparison.cells:
        entries = [comparison.entries.get((cell, model)) for model in comparison.models]
        body += (
            f"<tr><td>{html.escape(cell[0])}<br><small>{html.escape(cell[1])}</small></td>"
            + "".join("<td></td>" if entry is None else _cell(entry) for entry in entries)
            + "</tr>"
        )
    return f'<div class="wide"><table><tr><th>task</th>{head}</tr>{body}</table></div>'


def _cell(entry: Entry) -> str:
    lines = [html.escape(score_text(entry))]
    if entry.difference is not None:
        interval = entry.difference.interval
        kind = "gray" if interval.holds_zero else "better" if interval.mean > 0 else "worse"
        lines.append(
            f'<span class="{kind}">{html.escape(difference_text(entry))}</span> <small>better '
            f"{entry.difference.better}, worse {entry.difference.worse} of "
            f"{entry.difference.questions}</small>"
        )
    lines += [f"<small>{html.escape(note)}</small>" for note in entry.notes]
    return f"<td>{'<br>'.join(lines)}</td>"


def _card(each: Disagreement, images: _Pictures) -> str:
    """Returns one question with its images, its references and both answers."""
    row, summary = each.ours, each.model.summary
    shown = "".join(images.tag(name) for name in row.images[:MAX_IMAGES])
    if len(row.images) > MAX_IMAGES:
        shown += f"<small>{len(row.images) - MAX_IMAGES} more images</small>"
    kind = "better" if each.gap > 0 else "worse"
    return (
        f"<article><div>{shown}</div><div class=text><small>{html.escape(summary.task)} "
        f"({html.escape(summary.protocol)}), question {html.escape(str(row.question_id))}, "
        f'<span class="{kind}">{each.gap:+.2f}</span></small>'
        f"<pre>{_text(row.prompt)}</pre>"
        f"<small>expected</small><pre>{_text(' | '.join(row.answer))}</pre>"
        f"{_answer(each.model.model, each.ours)}{_answer(each.baseline.model, each.theirs)}"
        "</div></article>"
    )


def _answer(model: str, row: Row) -> str:
    text = f"error: {row.error}" if row.error else row.raw or "(empty)"
    read = "" if row.prediction in (None, row.raw) else f", read as {_text(str(row.prediction))}"
    return f"<small>{html.escape(model)}: {row.score:.2f}{read}</small><pre>{_text(text)}</pre>"


def _text(text: str) -> str:
    return html.escape(text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ...")


class _Pictures:
    """Turns images into tags with the picture inside; what cannot be read is said in its place.

    Attributes:
        problems: why images could not be read.
    """

    def __init__(self):
        self.stored, self.problems = StoredImages(), []

    def tag(self, name: str) -> str:
        """Returns the tag of an image."""
        try:
            image = load_image(self.stored.find(name))
        except (ConfigError, SampleError, OSError) as error:
            self.problems.append(str(error))
            return f'<p class="worse">{html.escape(str(error).partition(chr(10))[0])}</p>'
        if max(image.size) > SIDE:
            image = ImageOps.contain(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=85)
        text = base64.b64encode(data.getvalue()).decode()
        return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{text}"><br>'
