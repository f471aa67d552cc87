"""The Chinese pages say what the English ones say: same commands, same figures in tables, and links that work."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README_zh.md", *sorted((ROOT / "docs" / "zh").glob("*.md"))]
OWN_SECTIONS = {"文档", "中文现象索引"}  # without an English counterpart

# Sections of the translated pages that are in English alone: for few readers, or the start of a page whose sections
# stand on another Chinese one. A new section is translated, or added here.
ENGLISH_ONLY = {
    "README.md": {"where-to-read-on"},  # README_zh.md has a table of its own
    "docs/configuration.md": {
        "",
        "checks",
        "files-of-strangers",
        "args",
        "args-in-training",
        "model",
        "data",
        "deepspeed",
    },
    "docs/conversion.md": {"image-latents-of-15-5b-i2v", "cogkit", "tensor-names"},
    "docs/installing.md": {""},
    "docs/memory.md": {"bars", "switches-of-other-trainers", "published-figures-of-another-trainer"},
    "docs/prompts.md": {""},
    "docs/training.md": {"comparing-the-machines", "on-other-devices"},
    "docs/training_well.md": {""},
}

FENCED = re.compile(r"^```\w*\n.*?^```", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
MARK = re.compile(r"<!-- en: ([^ #]+)(?:#(\S+))? -->")  # under a heading: the English section that it translates
NUMBER = re.compile(r"\d(?:[\d.,]*\d)?")


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@cache
def sections(path: Path) -> dict[str, str]:
    """Return slug of the heading → text under it, up to the next heading; the start of a page has the slug ''."""
    texts, name, fenced = {"": ""}, "", False
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        fenced ^= line.startswith("```")
        if not fenced and (heading := re.match(r"##+ (.*)$", line)):
            name = slug(heading[1])
            texts[name] = ""
        texts[name] += line
    return texts


def translations() -> Iterator[tuple[Path, str, str, str]]:
    """Yield page, slug, Chinese text, and the text of the English section that it translates."""
    for page in PAGES:
        for name, text in sections(page).items():
            if found := MARK.search(text):
                english = sections(ROOT / found[1])
                assert (found[2] or "") in english, f"{page.name}: {found[0]} names no section; the heading has changed"
                yield page, name, text, english[found[2] or ""]


ALL = list(translations())


def tables(text: str) -> list[list[list[str]]]:
    """Return tables, rows and cells, without the line below the head."""
    found = []
    for table in TABLE.findall(FENCED.sub("", text)):
        rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in table.strip().splitlines()]
        found.append([[cell.strip() for cell in row] for k, row in enumerate(rows) if k != 1])
    return found


def facts(cell: str) -> tuple[list[str], list[str]]:
    """Return what is the same in any language: code, and numbers outside of it and of the targets of links."""
    cell = re.sub(r"\]\([^)]*\)", "]", cell)
    return sorted(re.findall(r"`([^`]+)`", cell)), sorted(NUMBER.findall(re.sub(r"`[^`]+`|\[[^]]*\]", "", cell)))


def labelled(value) -> str:
    return f"{value.stem}" if isinstance(value, Path) else str(value)[:30]


def test_the_pages_are_there_and_found():
    assert {page.stem for page in PAGES} >= {"README_zh", "sampling", "training", "data", "memory", "conversion"}
    assert "(README_zh.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    start = PAGES[0].read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if f"({p.relative_to(ROOT).as_posix()})" not in start] == []
    assert len(ALL) > 50


@pytest.mark.parametrize("page", PAGES, ids=labelled)
def test_every_section_names_the_english_one(page):
    headings = {slug(heading) for heading in re.findall(r"^##+ (.*)$", FENCED.sub("", page.read_text("utf-8")), re.M)}
    marked = {name for name, text in sections(page).items() if MARK.search(text)}
    assert headings - marked - {slug(name) for name in OWN_SECTIONS} == set()


def test_every_english_section_is_translated_or_known_not_to_be():
    done: dict[str, set[str]] = {}
    for page in PAGES:
        for file, anchor in MARK.findall(page.read_text(encoding="utf-8")):
            done.setdefault(file, set()).add(anchor)
    missing = {file: set(sections(ROOT / file)) - names for file, names in done.items()}
    assert {file: names for file, names in missing.items() if names} == ENGLISH_ONLY


@pytest.mark.parametrize(("page", "name", "text", "english"), ALL, ids=labelled)
def test_commands_and_figures_are_those_of_the_english_section(page, name, text, english):
    assert FENCED.findall(text) == FENCED.findall(english), "copy the blocks of the English section"
    ours, theirs = tables(text), tables(english)
    assert len(ours) == len(theirs), "a table is missing"
    for table, original in zip(ours, theirs, strict=True):
        assert [len(row) for row in table] == [len(row) for row in original]
        for row, english_row in zip(table[1:], original[1:], strict=True):
            for cell, english_cell in zip(row, english_row, strict=True):
                assert facts(cell) == facts(english_cell), f"{cell!r} differs from {english_cell!r}"


@pytest.mark.parametrize("page", PAGES, ids=labelled)
def test_links_and_files_exist(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        goal = (page.parent / file).resolve() if file else page
        if not goal.exists() or (anchor and anchor not in sections(goal)):
            broken.append(target)
    assert broken == []
    named = re.findall(r"`((?:configs|tools|sgm|docs|assets)/[\w./-]*\w\.(?:py|md|yaml|txt))`", text)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=labelled)
def test_the_text_is_chinese(page):
    text = re.sub(r"`[^`]+`|\([^)]*\)", "", MARK.sub("", FENCED.sub("", page.read_text(encoding="utf-8"))))
    paragraphs = [p for p in re.split(r"\n\s*\n", text) if not p.startswith(("|", "#")) and len(p) > 80]
    assert paragraphs and [p[:60] for p in paragraphs if len(re.findall(r"[\u4e00-\u9fff]", p)) < len(p) / 6] == []


def test_the_messages_of_the_index_are_those_of_the_code():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "sgm").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    index = sections(ROOT / "docs" / "zh" / "troubleshooting.md")["中文现象索引"]
    messages = [message for row in tables(index)[0][1:] for message in re.findall(r"`([^`]+)`", row[1])]
    assert len(messages) > 20 and [message for message in messages if message not in source] == []
