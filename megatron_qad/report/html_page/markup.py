"""HTML made of Python functions. Every string is escaped unless it is ``Markup``, so text from files stays text."""

from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"br", "col", "meta"}
"""Elements without content and end tag."""


class Markup(str):
    """A string that is HTML already."""


Content = str | Iterable["Content"] | None
"""Text, markup, or several of them."""


def markup(content: Content) -> Markup:
    """Return content as HTML.

    Example:
        >>> markup(["a < b", element("br")])
        'a &lt; b<br>'
    """
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(escape(content))
    return Markup("".join(map(markup, content)))


def element(tag: str, *content: Content, **attributes: str | int | None) -> Markup:
    """Return an HTML element.

    Args:
        attributes: by name; a trailing underscore is dropped (``class_``), and None leaves the attribute out.

    Example:
        >>> element("td", "<script>", class_="number")
        '<td class="number">&lt;script&gt;</td>'
    """
    given = (
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    start = f"<{tag}{''.join(given)}>"
    return Markup(start if tag in _VOID else f"{start}{markup(content)}</{tag}>")


def table(heads: Sequence[Content], rows: Iterable[Sequence[Content]], *, left: int = 1, class_: str = "") -> Markup:
    """Return a table. The first ``left`` columns are text, the others numbers. Narrow pages scroll it."""

    def cells(tag: str, row: Sequence[Content]) -> Markup:
        return element("tr", [element(tag, cell, class_=None if i < left else "number") for i, cell in enumerate(row)])

    head = element("thead", cells("th", heads))
    body = element("tbody", [Markup("\n"), *(cells("td", row) for row in rows)])
    return element("div", element("table", head, body, class_=class_ or None), class_="scroll")


def paragraph(*content: Content, class_: str | None = None) -> Markup:
    return element("p", *content, class_=class_)


def code(text: str) -> Markup:
    return element("code", text)
