"""What commands print: tables by rich where a person looks and rich is there, else plain text; one
JSON object with `--json`. Text that somebody else wrote is made harmless here."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pysnap.errors import printable

if TYPE_CHECKING:
    from rich.table import Table


class Output:
    """Standard output of a command."""

    def __init__(self, *, json: bool) -> None:
        self.json = json
        self._rich = not json and sys.stdout.isatty() and _has_rich()

    def data(self, value: dict[str, Any]) -> None:
        """The one object of `--json`; NaN and infinities are texts, as in a manifest."""
        print(json.dumps(_plain(value), allow_nan=False, ensure_ascii=True))

    def line(self, text: str = "") -> None:
        """A line of text."""
        print(_shown(text))

    def error(self, text: str) -> None:
        """A sentence on standard error."""
        print(f"pysnap: {_shown(text)}", file=sys.stderr)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows under the names of their columns; a name that begins with `>` is of numbers."""
        names = [column.removeprefix(">") for column in columns]
        cells = [[_shown(cell) for cell in row] for row in rows]
        right = [column.startswith(">") for column in columns]
        if self._rich:
            from rich.console import Console

            Console().print(_rich_table(names, right, cells))
            return
        for text in _plain_table(names, right, cells):
            print(text)

    @contextlib.contextmanager
    def live(self) -> Iterator[Callable[[Sequence[str], Sequence[Sequence[str]]], None]]:
        """Yields what shows a table in place of the one before; without rich, below it."""
        if not self._rich:

            def below(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
                self.table(columns, rows)
                print(flush=True)

            yield below
            return
        from rich.live import Live

        with Live(auto_refresh=False) as shown:

            def instead(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
                cells = [[_shown(cell) for cell in row] for row in rows]
                table = _rich_table(list(columns), [False] * len(columns), cells)
                shown.update(table, refresh=True)

            yield instead

    @contextlib.contextmanager
    def progress(self, total: int, what: str) -> Iterator[Callable[[int], object]]:
        """A bar of `total` bytes on standard error, if that is a terminal; yields what advances
        it."""
        if self.json or not sys.stderr.isatty() or not _has_rich():
            yield lambda count: None
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task(_shown(what), total=total)
            yield lambda count: bar.advance(task, count)


def size(count: float) -> str:
    """Bytes for people, such as `1.49 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def seconds(count: float | None) -> str:
    """A duration for people."""
    if count is None:
        return ""
    if count < 1:
        return f"{count * 1000:.3g} ms"
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 48.0)):
        if count < length:
            return f"{count:.3g} {unit}"
        count /= length if unit != "h" else 24.0
    return f"{count:.3g} d"


def number(value: object) -> str:
    """A metric: a few digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def age(created: str) -> str:
    """How long ago an ISO 8601 time was; empty for what is none."""
    import datetime

    try:
        then = datetime.datetime.fromisoformat(created.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return ""
    return seconds(max(0.0, time.time() - then))


def _rich_table(names: list[str], right: list[bool], cells: list[list[str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, is_right in zip(names, right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        # Text, for a string could hold markup.
        table.add_row(*map(Text, row))
    return table


def _plain_table(names: list[str], right: list[bool], cells: list[list[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    for row in (names, *cells):
        padded = (
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        yield "  ".join(padded).rstrip()


def _shown(text: str) -> str:
    shown = "\n".join(printable(line, 10_000) for line in text.split("\n"))
    # A terminal of another encoding gets escapes instead of an error.
    encoding = sys.stdout.encoding or "ascii"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None
