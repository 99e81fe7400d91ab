"""Pages of Markdown whose tables are made from records."""

from collections.abc import Mapping, Sequence

from sbora_diffusion.core.errors import FormatError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def with_tables(page: str, tables: Mapping[str, Sequence[str]]) -> str:
    """A page of Markdown with its tables made anew; each stands between two comments with its name.

    Args:
        tables: name → lines.

    Raises:
        FormatError: the page has no place for one of them.
    """
    for name, lines in tables.items():
        begin, end = f"<!-- table: {name} -->\n", f"<!-- end: {name} -->\n"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise FormatError(f"the page has no place for the table {name!r}", f"add {begin}{end}")
        page = "".join((before, begin, *(f"{line}\n" for line in lines), end, after))
    return page
