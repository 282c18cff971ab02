"""A progress bar on stderr for work that takes a while."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Work that ends sooner shows nothing.
_DELAY_SECONDS = 1.0
_SECONDS_BETWEEN_UPDATES = 0.1


class ProgressBar:
    """Counts up to a total; a context manager that leaves the terminal as it was."""

    def __init__(self, title: str, total: int, *, is_wanted: bool | None) -> None:
        """Show nothing yet.

        Args:
            title: What is counted.
            total: Where it ends.
            is_wanted: None: only if stderr is a terminal.
        """
        self._title = title
        self._total = total
        self._is_enabled = sys.stderr.isatty() if is_wanted is None else is_wanted
        self._next_update = monotonic() + _DELAY_SECONDS
        self._progress: Progress | None = None

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done: int, total: int | None = None) -> None:
        """So much is done; cheap enough for every step."""
        if not self._is_enabled or (now := monotonic()) < self._next_update:
            return
        self._next_update = now + _SECONDS_BETWEEN_UPDATES
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            console = Console(stderr=True)
            # On a terminal the bar vanishes when the work is done; elsewhere only its last state is written.
            self._progress = Progress(*columns, console=console, transient=console.is_terminal)
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total)
        self._progress.update(self._task, completed=done, total=self._total if total is None else total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
