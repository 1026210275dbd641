"""Every citation of a design page resolves.

`design: PAGE.md N` cites the heading with number N of docs/design/PAGE.md.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs" / "design"
PAGES = sorted(path.name for path in DESIGN.glob("*.md") if path.name != "README.md")
SUFFIXES = (".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".json")
LEFT_OUT = ("golden", "assets", "runs", "node_modules")
MARK = "design" + ": "
OLD_MARK = "spec" + ": "

# After the mark: everything to the end of the bracket or sentence, over line breaks of a comment or
# docstring.
CITATION = re.compile(MARK + r"((?:[a-z]+\.md)\b[^()\"]*)")
# A page, and its numbers with what may stand between them: "4", "8.4", "3 to 8, 10", "10-17",
# "2 and 16".
NUMBER = r"\d+(?:\.\d+)?"
PAGE = re.compile(rf"\b([a-z]+\.md)(?: ({NUMBER}(?:(?:, | to | and |-){NUMBER})*))?(?![\w-])")
# Docstrings cite without the mark, too. A number has to follow here, because docs/ has pages of the
# same names.
BARE = re.compile(rf"(?<![\w/.])([a-z]+\.md) ({NUMBER}(?:(?:, | to | and |-){NUMBER})*)(?![\w-])")


def texts():
    """Yields (path, text) of every source, document and config.

    Line breaks with their indent or comment sign become blanks.
    """
    for path in sorted(ROOT.rglob("*")):
        inside = path.relative_to(ROOT).parts
        if path.suffix in SUFFIXES and not any(
            part.startswith(".") or part in LEFT_OUT for part in inside
        ):
            text = path.read_text(encoding="utf-8")
            yield path.relative_to(ROOT), re.sub(r"\s*\n\s*(?:# |> |\* )?", " ", text)


def numbers(cited):
    """Yields every section that a list of numbers names: "3 to 5, 8.4" -> 3, 4, 5, 8.4."""
    for part in re.split(r", | and ", cited or ""):
        first, *last = re.split(r" to |-", part)
        yield from map(str, range(int(first), int(last[0]) + 1)) if last else filter(None, [first])


def citations(text):
    """Yields (page, number) of every citation in a text.

    The number is None where a page is cited as a whole.
    """
    for found in CITATION.finditer(text):
        for page, cited in PAGE.findall(found[1]):
            yield from ((page, number) for number in numbers(cited)) if cited else [(page, None)]
    for page, cited in BARE.findall(text):
        if page in PAGES:
            yield from ((page, number) for number in numbers(cited))


def sections(page):
    """Returns the numbers of the headings of a page."""
    return set(re.findall(rf"^#{{2,4}} ({NUMBER})\.? ", (DESIGN / page).read_text(), re.MULTILINE))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(X: model.md 4)", {("model.md", "4")}),
        (
            "(X: data.md 3 to 5, 8.4)",
            {("data.md", "3"), ("data.md", "4"), ("data.md", "5"), ("data.md", "8.4")},
        ),
        ("(X: data.md 10-12)", {("data.md", "10"), ("data.md", "11"), ("data.md", "12")}),
        (
            "(X: training.md 5, 8; platform.md 2)",
            {("training.md", "5"), ("training.md", "8"), ("platform.md", "2")},
        ),
        ("(X: training.md 12, platform.md 6)", {("training.md", "12"), ("platform.md", "6")}),
        ("(X: model.md, PVTC; paper section 3.1)", {("model.md", None)}),
        (
            "(X: evaluation.md 5, 8, tests 4 and 9)",
            {("evaluation.md", "5"), ("evaluation.md", "8")},
        ),
        ("(X: evaluation.md 6: exact, ANLS)", {("evaluation.md", "6")}),
        ("    def f(X: str, shape: tuple)", set()),
    ],
)
def test_reading(text, expected):
    assert set(citations(text.replace("X: ", MARK))) == expected


def test_citations_resolve():
    """Pages and numbers cited anywhere in the repository exist."""
    headings = {page: sections(page) for page in PAGES}
    wrong = [
        f"{path}: {page} {number or ''}"
        for path, text in texts()
        for page, number in set(citations(text))
        if page not in headings or (number is not None and number not in headings[page])
    ]
    assert not wrong


def test_one_name():
    """Nothing cites the pages by the name that they had before they were in the repository."""
    old = re.compile(OLD_MARK + r"(?:[a-z]+\.md|paper)")
    assert not [
        str(path) for path, text in texts() if path.name != "CHANGELOG.md" and old.search(text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_numbering(page):
    """Sections of a page are numbered from 1, none twice and none left out."""
    headings = re.findall(r"^## (.*)", (DESIGN / page).read_text(), re.MULTILINE)
    assert [heading.split(".")[0] for heading in headings] == [
        str(n) for n in range(1, len(headings) + 1)
    ]


def test_index():
    """The index names every page."""
    assert set(re.findall(r"\]\(([a-z]+\.md)\)", (DESIGN / "README.md").read_text())) == set(PAGES)
