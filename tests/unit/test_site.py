"""The documentation builds as a site without a warning, and its pages load nothing from other servers."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOK = runpy.run_path(str(ROOT / "tools/site_pages.py"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site: mkdocs --strict fails on broken links and anchors, and on pages that the navigation lacks."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return directory


def test_pages_load_nothing_from_other_servers(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    loaded = re.compile(r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* href="(?:https?:)?//')
    assert not [page.name for page in pages if loaded.search(page.read_text())]


def test_docstrings_are_on_the_python_page(site):
    text = re.sub(r"<!--.*?-->", "", (site / "python.html").read_text(), flags=re.DOTALL)
    assert "before_update" in text, "events of callbacks"
    assert ":::" not in text


def test_headings_lists_and_code_are_rendered(site):
    text = (site / "howto" / "add_a_family.html").read_text()
    assert text.count("<ol>") == 1, "the code blocks of the steps are within the items of one list"
    assert text.count("<li>\n<p><strong>") == 9, "steps"
    assert "```" not in re.sub(r"<code>.*?</code>", "", text, flags=re.DOTALL)


def test_no_paragraph_holds_a_list_a_table_or_a_link_that_was_not_read(site):
    unread = re.compile(r"\n *[-*] |\n *\d+\. |\n *\|.*\||\]\(")
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code).*?</\1>", "", page.read_text(), flags=re.DOTALL)
        paragraphs = re.findall(r"<p>(.*?)</p>", text, re.DOTALL)
        assert not [paragraph for paragraph in paragraphs if unread.search(paragraph)], page


@pytest.mark.parametrize(
    "text, page, repo_url, expected",
    [
        ("[a](../README.md)", "x.md", None, "a (`README.md`)"),
        ("[`tools/plan.py`](../../tools/plan.py)", "howto/x.md", None, "`tools/plan.py`"),
        ("[a](../README.md#install)", "x.md", "https://host/q/", "[a](https://host/q/blob/main/README.md#install)"),
        ("[a](policies.md#rules)", "x.md", None, "[a](policies.md#rules)"),
        ("[a](../policies.md)", "howto/x.md", None, "[a](../policies.md)"),
        ("[a](https://arxiv.org)", "x.md", None, "[a](https://arxiv.org)"),
        ("`[a](../README.md)`", "x.md", None, "`[a](../README.md)`"),
    ],
)
def test_links_out_of_the_documents(text, page, repo_url, expected):
    assert HOOK["with_inner_links"](text, page, repo_url) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("text\n- a\n- b\n", "text\n\n- a\n- b\n"),
        ("1. a\n\n   code\n2. b\n", "1. a\n\n    code\n\n2. b\n"),
        ("- a\n  - b\n    c\n\ntext\n", "- a\n    - b\n        c\n\ntext\n"),
        ("1. a\n   ```\n   - b\n   ```\n", "1. a\n    ```\n    - b\n    ```\n"),
        ("```\ntext\n- a\n```\n", "```\ntext\n- a\n```\n"),
        ("text\n\n    indented\n    - code\n", "text\n\n    indented\n    - code\n"),
    ],
)
def test_lists_as_python_markdown_reads_them(text, expected):
    assert HOOK["with_wide_lists"](text) == expected
