"""Tokens with the largest KL, in their context."""

from collections.abc import Mapping

from megatron_qad.report.html_page.markup import Content, Markup, element, paragraph, table

NUM_SHOWN = 5
"""Tokens of each model on the page; results.json has the others."""


def worst_section(comparison: Mapping) -> list[Markup]:
    """Return one table for each model that differs from its teacher."""
    parts = [
        paragraph(
            f"The {NUM_SHOWN} tokens of each model with the largest KL: the text before the token, the token that "
            "follows in the text (marked), and what teacher and model find most likely instead. \u23ce is a line "
            "break, \u00b7 a space at the end of a token's text."
        )
    ]
    for evaluation in comparison["evaluations"]:
        tokens = [one for one in evaluation["worst"] if one["kl"] > 0][:NUM_SHOWN]
        if tokens:
            heads = ["KL", "text and token", "teacher", "model", "cross entropy: teacher", "model"]
            rows = (_row(one) for one in tokens)
            parts += [element("h3", evaluation["name"]), _token_table(heads, rows)]
    return parts


def _row(one: Mapping) -> list[Content]:
    return [
        f"{one['kl']:.3g}",
        [shown_text(one["context"]), element("mark", shown_token(one["token"]))],
        element("code", shown_token(one["teacher"])),
        element("code", shown_token(one["student"])),
        f"{one['teacher_cross_entropy']:.2f}",
        f"{one['cross_entropy']:.2f}",
    ]


def _token_table(heads, rows) -> Markup:
    return table(heads, rows, left=4, class_="tokens")


def shown_text(text: str) -> str:
    """Return text with visible line breaks and without other control characters."""
    text = text.replace("\r\n", "\n").replace("\n", "\u23ce")
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def shown_token(text: str) -> str:
    """Return a token's text with visible spaces at its ends."""
    shown = shown_text(text)
    inner = shown.strip(" ")
    if not inner:
        return "\u00b7" * len(shown) or "(empty)"
    start = len(shown) - len(shown.lstrip(" "))
    return "\u00b7" * start + inner + "\u00b7" * (len(shown) - start - len(inner))
