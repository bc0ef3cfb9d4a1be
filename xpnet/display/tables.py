"""Tables that are text on a terminal and HTML in a notebook."""

from collections.abc import Sequence

_LEFT, _RIGHT = "text-align: left", "text-align: right"


class Summary(str):
    """A string that a prompt shows as its text, without quotes, and a notebook as a table. html: that table."""

    html: str = ""

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return self.html


def summary(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: str) -> Summary:
    """A table whose last column has numbers. title: shown in a notebook only."""
    left = len(header) - 1
    rule = ["-" * width for width in _widths([header, *rows])]
    text = Summary(f"{text_table([header, rule, *rows], left)}\n{footer}")
    text.html = html_table(title, header, rows, footer, left)
    return text


def text_table(rows: Sequence[Sequence[str]], left: int = 0) -> str:
    """Lines of aligned columns. left: how many of the first columns hold words, which are aligned on the left."""
    widths = _widths(rows)
    return "\n".join(
        "  ".join([*map(str.ljust, row[:left], widths), *map(str.rjust, row[left:], widths[left:])]) for row in rows
    )


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The length of the longest text in each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def html_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: str = "", left: int = 0
) -> str:
    """A table of these texts, which are escaped. left: how many of its first columns hold words."""
    from html import escape  # here, because its table of characters takes a millisecond

    def line(tag: str, row: Sequence[str]) -> str:
        cells = [f'<{tag} style="{_LEFT if i < left else _RIGHT}">{escape(text)}</{tag}>' for i, text in enumerate(row)]
        return f"<tr>{''.join(cells)}</tr>"

    parts = [f'<table><caption style="{_LEFT}">{escape(title)}</caption>', f"<thead>{line('th', header)}</thead>"]
    parts.append(f"<tbody>{''.join(line('td', row) for row in rows)}</tbody>")
    if footer:
        parts.append(f'<tfoot><tr><td colspan="{len(header)}" style="{_LEFT}">{escape(footer)}</td></tr></tfoot>')
    return "\n".join([*parts, "</table>"])
