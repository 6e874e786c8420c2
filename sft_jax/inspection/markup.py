"""Text as HTML in which nothing of it can act: every piece of content goes through here."""

import html
from collections.abc import Iterable

from sft_jax.inspection.fragments import Fragment
from sft_jax.inspection.terminal import weight_class
from sft_jax.printable import printable, split_unsafe


def escape(text: str) -> str:
    """Returns a text for HTML, also inside of quoted attributes; what must not be shown as it is in escaped form."""
    return html.escape(printable(text))


def tokens_html(pieces: Iterable[Fragment]) -> str:
    """Returns fragments as spans with the class of their weight; the weight itself where it is neither 0 nor 1."""
    return "".join(_fragment(piece) for piece in pieces)


def _fragment(piece: Fragment) -> str:
    name = weight_class(piece.weight)
    classes = " ".join([*(["w", name] if name != "none" else []), *(["control"] if piece.control else [])])
    weight = "" if name in ("none", "one") else f' title="weight {piece.weight:.4g}"'
    text = "".join(
        f'<span class="unsafe">{escape(part)}</span>' if unsafe else html.escape(part)
        for part, unsafe in split_unsafe(piece.text)
    )
    return f'<span class="{classes}"{weight}>{text}</span>' if classes else text
