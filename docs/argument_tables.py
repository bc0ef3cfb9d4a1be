"""An extension of Griffe: explanations of arguments and attributes become tables in the reference.

A docstring explains them as "name: text" or "first, second: text", at the beginning of a line,
after two spaces or after a sentence. The explanation ends where the next one begins, or with the
paragraph. Lines of comments that begin with "#:" explain the attribute of the class that follows.
"""

import re

import griffe

#: An argument, perhaps with its shape or form: "sample_weight (N,)", "class_weight {class: w}".
_NAME = r"\w+(?: \([^)\n]*\)| \{[^}\n]*\})?"
_ITEM = re.compile(rf"(?:^ *|  +|(?<=[.;] ))({_NAME}(?:, {_NAME})*):[ \n]+", re.MULTILINE)


class ArgumentTables(griffe.Extension):
    """Rewrites the docstrings of all classes and functions of a package."""

    def on_package(self, *, pkg, loader, **_):
        """Called when all modules are loaded, so that inherited constructors are known."""
        _rewrite(pkg, set())


def _rewrite(parent, seen):
    for member in list(parent.members.values()):
        if member.is_alias or member.path in seen:
            continue
        seen.add(member.path)
        if (member.is_class or member.is_function) and member.docstring is not None:
            names = {one.name.lstrip("*") for one in member.parameters} - {"self", "cls"}
            if member.is_class:
                names |= {name for name, one in member.members.items() if one.is_attribute}
            member.docstring.value = with_tables(member.docstring.value, names)
            if member.is_class:
                lines = {
                    name: one.lineno - member.lineno
                    for name, one in member.members.items()
                    if one.is_attribute
                }
                member.docstring.value += with_comments(member.lines, lines)
        if member.is_module or member.is_class:
            _rewrite(member, seen)


def with_tables(text, names):
    """The docstring, with a table in place of what it says about arguments and attributes."""
    return "\n\n".join(_paragraph(paragraph, names) for paragraph in re.split(r"\n\n+", text))


def with_comments(source, attributes):
    """A table of the attributes that have comments, or "".

    attributes: {name: its place in the lines of the class}.
    """
    rows = []
    for name, place in attributes.items():
        comment = []
        while source[place - 1].lstrip().startswith("#:"):
            place -= 1
            comment.insert(0, source[place].lstrip().removeprefix("#:"))
        if comment and not name.startswith("_"):
            rows.append(f"| `{name}` | {_cell(' '.join(comment))} |")
    return "\n\n" + _table("attribute", rows) if rows else ""


def _table(header, rows):
    return "\n".join([f"| {header} | meaning |", "|---|---|", *rows])


def _paragraph(paragraph, names):
    if paragraph.startswith("    "):
        return paragraph  # code
    found = [match for match in _ITEM.finditer(paragraph) if _names(match[1]) <= names]
    if not found:
        return paragraph
    paragraph, after = _without_end(paragraph, found[-1].end())
    rows = []
    for match, following in zip(found, [*found[1:], None], strict=True):
        meaning = paragraph[match.end() : following.start() if following else None]
        listed = re.sub(_NAME, _as_code, match[1]).replace(", `", ",<br>`")
        rows.append(f"| {listed} | {_cell(meaning)} |")
    before = paragraph[: found[0].start()].rstrip()
    return "\n\n".join(part for part in (before, _table("name", rows), after) if part)


def _without_end(paragraph, start):
    """(the paragraph, the sentences at its end from "Returns …", "Raises …" or a reference on)."""
    last = re.compile(r"(?<=\.)(?:\s+(?=Returns? |Raises? )|\n(?=[A-Z].*? (?:19|20)\d\d,))").search(
        paragraph, start
    )
    return (paragraph, "") if last is None else (paragraph[: last.start()], paragraph[last.end() :])


def _names(listed):
    return set(re.findall(r"\w+", re.sub(r"\([^)]*\)|\{[^}]*\}", "", listed)))


def _as_code(match):
    name, _, form = match[0].partition(" ")
    return f"`{name}`" + (f" {form}" if form else "")


def _cell(text):
    """Text on one line, in which | does not end the cell."""
    line = " ".join(text.split())
    return "`".join(
        part if i % 2 else part.replace("|", "&#124;") for i, part in enumerate(line.split("`"))
    )
