"""A hook of mkdocs (mkdocs.yml) that converts the pages of docs/, which are written for GitHub, to Python-Markdown.

- **Links out of docs/** lead to the repository's page if mkdocs.yml names one (``repo_url``). Otherwise the text and
  the path remain, without a link.
- **Lists.** GitHub accepts a list directly after a paragraph, and continues an item by the width of its marker.
  Python-Markdown needs a blank line and four columns.
"""

import re
from pathlib import PurePosixPath
from posixpath import normpath

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_MARKER = re.compile(r"(?:[-*+]|\d+[.)]) +(?=\S)")
_FENCE = re.compile(r"`{3,}|~{3,}")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Convert a page. mkdocs calls this function for each page before it renders it."""
    return with_inner_links(with_wide_lists(markdown), page.file.src_uri, config.repo_url)


def with_inner_links(markdown: str, page: str, repo_url: str | None) -> str:
    """Replace links to files outside of docs/. Code is not changed.

        >>> with_inner_links("[recipes](../examples/recipes/README.md)", "planning.md", None)
        'recipes (`examples/recipes/README.md`)'

    Args:
        page: path of the page below docs/.
    """

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        if ":" in target or target.startswith("#"):
            return match.group()
        path, _, anchor = target.partition("#")
        path = normpath(PurePosixPath("docs", page).parent / path)
        if path.startswith("docs/"):
            return match.group()
        if repo_url:
            return f"[{text}]({repo_url.rstrip('/')}/blob/main/{path}{'#' if anchor else ''}{anchor})"
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    pieces, end = [], 0
    for code in _code_spans(markdown):
        pieces += [_LINK.sub(replace, markdown[end : code[0]]), markdown[code[0] : code[1]]]
        end = code[1]
    return "".join([*pieces, _LINK.sub(replace, markdown[end:])])


def _code_spans(markdown: str) -> list[tuple[int, int]]:
    """Return the start and the end of each code span. Code in the text of a link is left out."""
    links = [match.span(1) for match in _LINK.finditer(markdown)]
    spans = [match.span() for match in _CODE.finditer(markdown)]
    return [(start, end) for start, end in spans if not any(a <= start and end <= b for a, b in links)]


def with_wide_lists(markdown: str) -> str:
    """Indent list items by four columns per level, and put a blank line before each list.

    If an item contains a blank line, a blank line is also put between the items of its list.
    """
    lines, widths, fence, before, is_loose = [], [], None, "", False
    for line in markdown.splitlines():
        text, indent, was_list = line.lstrip(), len(line) - len(line.lstrip()), bool(widths)
        if not text:
            lines.append("")
            before, is_loose = "", is_loose or bool(widths)
            continue
        starts_item = fence is None and _MARKER.match(text) and (not widths or indent <= widths[-1] + 3)
        if fence is None and (starts_item or not before or indent > 0):
            while widths and indent < widths[-1]:
                widths.pop()
        column = widths[-1] if widths else 0
        rest = line[min(indent, column) :]
        if starts_item and indent - column < 4:
            rest = text
            if before and (is_loose or not was_list):
                lines.append("")
            lines.append("    " * len(widths) + rest)
            widths.append(indent + _MARKER.match(text).end())
        else:
            lines.append("    " * len(widths) + rest)
        if (mark := _FENCE.match(text)) and (fence is None or text.startswith(fence)):
            fence = mark.group() if fence is None else None
        before, is_loose = "" if text.startswith("#") else text, is_loose and bool(widths)
    return "\n".join(lines) + "\n"
