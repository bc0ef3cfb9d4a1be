"""Tables that are text on a terminal and HTML in a notebook."""

from collections.abc import Sequence
from typing import TypeAlias

#: The name of a group of rows, and the rows.
Group: TypeAlias = tuple[str, Sequence[Sequence[str]]]

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


def grouped_text_table(header: Sequence[str], groups: Sequence[Group]) -> str:
    """Lines of aligned columns. The first column has the name of each group, in its first row only."""
    rows = [(name if i == 0 else "", *row) for name, rows in groups for i, row in enumerate(rows)]
    rule = ["-" * width for width in _widths([header, *rows])]
    lines = text_table([header, rule, *rows], len(header)).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def grouped_html_table(title: str, header: Sequence[str], groups: Sequence[Group]) -> str:
    """A table of these texts, which are escaped. The first column has the name of each group, a head of its rows."""
    from html import escape  # here, because its table of characters takes a millisecond

    def head(scope: str, text: str, span: int = 1) -> str:
        rows = f' rowspan="{span}"' if span > 1 else ""
        return f'<th scope="{scope}"{rows} style="{_LEFT}; vertical-align: top">{escape(text)}</th>'

    parts = [f'<table><caption style="{_LEFT}">{escape(title)}</caption>']
    parts.append(f"<thead><tr>{''.join(head('col', text) for text in header)}</tr></thead>")
    for name, rows in groups:
        parts.append("<tbody>")
        for i, (first, *others) in enumerate(rows):
            group = head("rowgroup", name, len(rows)) if i == 0 else ""
            cells = "".join(f'<td style="{_LEFT}">{escape(text)}</td>' for text in others)
            parts.append(f"<tr>{group}{head('row', first)}{cells}</tr>")
        parts.append("</tbody>")
    return "\n".join([*parts, "</table>"])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """The length of the longest text in each column."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def html_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], footer: str = "", left: int = 0
) -> str:
    """A table of these texts, which are escaped. left: how many of its first columns hold words."""
    from html import escape  # here, because its table of characters takes a millisecond

    def line(tag: str, row: Sequence[str]) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        cells = [
            f'<{tag}{scope} style="{_LEFT if i < left else _RIGHT}">{escape(text)}</{tag}>'
            for i, text in enumerate(row)
        ]
        return f"<tr>{''.join(cells)}</tr>"

    parts = [f'<table><caption style="{_LEFT}">{escape(title)}</caption>', f"<thead>{line('th', header)}</thead>"]
    parts.append(f"<tbody>{''.join(line('td', row) for row in rows)}</tbody>")
    if footer:
        parts.append(f'<tfoot><tr><td colspan="{len(header)}" style="{_LEFT}">{escape(footer)}</td></tr></tfoot>')
    return "\n".join([*parts, "</table>"])
