"""The result of an attack: how many cases were tried, and which of them went wrong."""

import dataclasses


@dataclasses.dataclass
class Result:
    """One row of the summary."""

    #: What was tried, in the plural: "mutated model files".
    cases: str
    tried: int = 0
    #: One line for each case that went wrong: how to repeat it, what came, and what is right.
    bad: list[str] = dataclasses.field(default_factory=list)
    #: What else the reader should know, such as "emulated" or the growth of memory that was measured.
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.cases}: {self.tried:,} tried, {len(self.bad):,} bad{f' ({self.note})' if self.note else ''}"]
        lines += [f"    {text}" for text in self.bad[:20]]
        if len(self.bad) > 20:
            lines.append(f"    and {len(self.bad) - 20:,} more")
        return "\n".join(lines)


def scaled(count: int, scale: float, least: int = 1) -> int:
    """`count` times `scale`, but at least `least`."""
    return max(least, round(count * scale))
