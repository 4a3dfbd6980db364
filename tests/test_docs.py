"""The pages: links lead somewhere, both languages are there, samples are what a model says."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.fixture(autouse=True)
def docs_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "docs"), *sys.path])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = {match[1] for match in LINK.finditer(page.read_text(encoding="utf8")) if "://" not in match[1]}
    assert [target for target in sorted(targets) if not (page.parent / target).exists()] == []


def test_every_page_but_the_lab_log_is_in_both_languages() -> None:
    names = {page.name for page in PAGES}
    english = {name for name in names if "_zh" not in name and name not in ("lab-log.md", "errors.md")}
    assert {name.replace(".md", "_zh.md") for name in english} == {name for name in names if "_zh" in name}


def test_samples_are_asked_of_the_checkpoint_that_a_block_names() -> None:
    from samples import renewed

    page = (
        "text\n<!-- sample: out/a -->\n```\n> Q1\nold\n> Q2\nolder\n```\nrest\n"
        '<!-- sample: out/b -->\n```python\nchat = [{"content": "Q3"}]\nprint(chat)\n# old\n```\n'
    )
    new = renewed(page, lambda checkpoint, question: f"{checkpoint} says {question}")
    assert new == page.replace("\nold\n> Q2\nolder", "\nout/a says Q1\n> Q2\nout/a says Q2").replace(
        "# old", "# out/b says Q3"
    )


@pytest.mark.parametrize("english", ["README.md", "interoperability.md"])
def test_both_languages_show_the_same_samples(english: str) -> None:
    from samples import BLOCK

    pages = {page.name: page.read_text(encoding="utf8") for page in PAGES}
    blocks = [[re.findall(r"^(?:> |# ).*$", block[2], re.M) for block in BLOCK.finditer(pages[name])]
              for name in (english, english.replace(".md", "_zh.md"))]  # fmt: skip
    assert blocks[0] == blocks[1] != []
