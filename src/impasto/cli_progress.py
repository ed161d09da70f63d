"""What the terminal shows while pictures are drawn: a bar of the denoising steps.

Knows rich's bars and our progress events. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from impasto.types import Progress

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def denoising(console: Console, steps: int) -> Iterator[Callable[[Progress], None]]:
    """Show a bar for the length of a block, and yield what moves it; ``console`` prints above it meanwhile."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("denoising"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Bar(*columns, TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("denoising", total=steps, pace="")
        yield lambda event: bar.update(
            task, total=event.total, completed=event.step, pace=f"{event.seconds:.2f} s/step"
        )
