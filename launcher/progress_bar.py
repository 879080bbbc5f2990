"""Shows the preparation of a corpus or a tokenizer on a console: a bar while it runs, tables at its end."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from triplane.data.prepare import Progress as Progressed
from triplane.data.report import Report
from triplane.plan.tables import plain_table

_BAR_CELLS = 16


class _Bar:
    """Shows a label, a bar, figures and a time on a terminal; disappears when it ends."""

    def __init__(self, console: Console, label: str, time: ProgressColumn):
        self._is_shown = console.is_interactive  # elsewhere rich would leave an empty line
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(_BAR_CELLS),
            TextColumn("{task.fields[figures]}"),
            time,
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=None, figures="")

    def __enter__(self) -> Self:
        if self._is_shown:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_shown:
            self._bar.stop()


class PreparationBar(_Bar):
    """Shows the progress of a preparation."""

    def __init__(self, console: Console):
        super().__init__(console, "tokenizing", TimeRemainingColumn(compact=True))
        self._resumed_tokens: int | None = None

    def update(self, now: Progressed) -> None:
        """Shows `now`, with the rate since this process started."""
        if self._resumed_tokens is None:
            self._resumed_tokens = now.tokens
        task: Task = self._bar.tasks[0]
        rate = (now.tokens - self._resumed_tokens) / (task.elapsed or 1)
        figures = f"{now.documents:,} docs  {_read(now.read_bytes, now.total_bytes)}  {_short(rate)} tok/s"
        self._bar.update(self._task, completed=now.read_bytes, total=now.total_bytes, figures=figures)


class TokenizerBar(_Bar):
    """Shows how much text is read to train a tokenizer, then how long the training takes."""

    def __init__(self, console: Console):
        super().__init__(console, "reading", TimeElapsedColumn())

    def read(self, read_bytes: int, total_bytes: int | None) -> None:
        """Shows how much of the input is read."""
        self._bar.update(self._task, completed=read_bytes, total=total_bytes, figures=_read(read_bytes, total_bytes))

    def train(self) -> None:
        """Shows that the training has begun, which does not tell how far it is."""
        self._bar.remove_task(self._task)  # rich keeps the total of a task that is reset
        self._task = self._bar.add_task("training the tokenizer", total=None, figures="")


def _read(read_bytes: int, total_bytes: int | None) -> str:
    of = "" if total_bytes is None else f" of {total_bytes / 1e6:,.1f}"
    return f"{read_bytes / 1e6:,.1f}{of} MB"


def show_report(console: Console, report: Report) -> None:
    """Prints the contents of a corpus, what was held out, and what was rejected."""
    splits = {"train": report.train, "validation": report.validation}
    sizes = plain_table("", *splits)
    for label, numbers in {
        "documents": [f"{counts.documents:,}" for counts in splits.values()],
        "tokens": [f"{counts.tokens:,}" for counts in splits.values()],
        "text MB": [f"{counts.text_bytes / 1e6:,.1f}" for counts in splits.values()],
        "bytes/token": [f"{counts.bytes_per_token:.2f}" for counts in splits.values()],
    }.items():
        sizes.add_row(label, *numbers)
    console.print(sizes)
    lengths = plain_table("tokens in a document", *splits, "share of all")
    for column in lengths.columns[1:-1]:
        column.no_wrap = True  # a narrow terminal wraps the first column
    documents = report.train.documents + report.validation.documents
    for power in range(max(len(counts.lengths) for counts in splits.values())):
        row = [counts.lengths[power] if power < len(counts.lengths) else 0 for counts in splits.values()]
        if sum(row):
            share = f"{100 * sum(row) / documents:.1f} %"
            lengths.add_row(f"{1 << power:,} to {(2 << power) - 1:,}", *(f"{count:,}" for count in row), share)
    console.print()
    console.print(lengths)
    console.print(f"\nheld out for validation: {_held_out(report)}")
    if report.rejected:
        rejected = Table("rejected because", "inputs", "the first", box=None, header_style="bold", pad_edge=False)
        rejected.columns[1].justify = "right"
        for reason, what in sorted(report.rejected.items(), key=lambda item: -item[1].count):
            rejected.add_row(Text(reason), f"{what.count:,}", Text(what.first))
        console.print()
        console.print(rejected)


def _held_out(report: Report) -> str:
    held, documents = report.validation, report.train.documents + report.validation.documents
    tokens = report.train.tokens + held.tokens
    which = (
        "the end of the only document" if report.validation_is_end else f"{held.documents:,} of {documents:,} documents"
    )
    return f"{which}, {held.tokens:,} of {tokens:,} tokens ({100 * held.tokens / tokens:.1f} %)"


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"
