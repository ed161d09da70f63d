"""The command line's ``impasto status``: workers, queue, rates and disks, for people or as JSON.

Knows how that looks in a terminal. Knows nothing of how it is found out (``jobs/overview.py``). It asks the database
and the disks, no running process, so it tells the truth even when nothing answers.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from impasto.config import Settings
    from impasto.jobs.overview import Overview

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the service. (IMPASTO_DATA_DIR)")]
DatabaseUrl = Annotated[
    str | None, typer.Option("--database-url", help="Its job store, if elsewhere. (IMPASTO_DATABASE_URL)")
]
Config = Annotated[Path | None, typer.Option("--config", help="TOML file with settings. (IMPASTO_CONFIG)")]
_SIZES = ("free_bytes", "total_bytes")
_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Show how it is going: workers, the queue, what ended lately, room on the disks.

    The exit status is 1 if jobs wait and no worker was heard of lately.
    """
    from impasto.config import Settings
    from impasto.jobs.database import open_database
    from impasto.jobs.overview import Overview
    from impasto.jobs.upkeep import require_newest

    given = {"data_dir": data_dir, "database_url": database_url}
    settings = Settings.load(config, {name: value for name, value in given.items() if value})
    database = open_database(settings.database)
    require_newest(database)
    seen, disks = Overview.of(database), _disks(settings)
    database.dispose()
    if as_json:
        print(json.dumps({**asdict(seen), "disks": disks}))
    else:
        _show(seen, disks)
    alone = not any(worker.there for worker in seen.workers)
    raise typer.Exit(1 if alone and any(queue.waiting for queue in seen.queues) else 0)


def _disks(settings: Settings) -> list[dict[str, Any]]:
    """Return the room where this machine keeps things; a bucket has none that we know of."""
    places = {"data": settings.data_dir}
    if "://" not in settings.output_root:
        places["pictures"] = Path(settings.output_root)
    found = []
    for name, path in places.items():
        there = next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())
        usage = shutil.disk_usage(there)
        found.append({"what": name, "path": str(path), "free_bytes": usage.free, "total_bytes": usage.total})
    return found


def _show(seen: Overview, disks: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console()
    for table in (_workers(seen), _queues(seen), _ended(seen), _room(disks)):
        console.print(table)


def _workers(seen: Overview) -> Table:
    from rich.table import Table

    table = Table("worker", "device", "heard", "jobs", "completed", "pictures", title="Workers", title_justify="left")
    for worker in seen.workers:
        heard = f"{_time(worker.silent)} ago"
        table.add_row(
            worker.id,
            worker.device,
            heard if worker.there else f"[red]{heard}: gone?[/]",
            f"{worker.running} of {worker.slots}",
            str(worker.completed),
            str(worker.images),
        )
    if not seen.workers:
        table.add_row("[red]none[/]", "", "", "", "", "")
    return table


def _queues(seen: Overview) -> Table:
    from rich.table import Table

    table = Table("pool", "waiting", "oldest", "running", title="Queue", title_justify="left")
    for queue in seen.queues:
        oldest = _time(queue.oldest) if queue.waiting else "-"
        table.add_row(queue.pool, str(queue.waiting), oldest, str(queue.running))
    return table


def _ended(seen: Overview) -> Table:
    from rich.table import Table

    columns = ("in the last", "completed", "a minute", "failed", "cancelled", "waited", "ran")
    table = Table(*columns, title="Ended", title_justify="left")
    for ended in seen.ended:
        table.add_row(
            _time(ended.seconds),
            str(ended.completed),
            f"{ended.completed * _MINUTE / ended.seconds:.1f}",
            f"[red]{ended.failed}[/]" if ended.failed else "0",
            str(ended.cancelled),
            _time(ended.waited),
            _time(ended.ran),
        )
    return table


def _room(disks: list[dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table("disk of", "folder", "free", "of", title="Room", title_justify="left")
    for disk in disks:
        table.add_row(disk["what"], disk["path"], *(f"{disk[name] / 2**30:.1f} GiB" for name in _SIZES))
    return table


def _time(seconds: float) -> str:
    """Write a time as people say it: ``0.4 s``, ``12 s``, ``3 min``, ``2.5 h``, ``3 days``."""
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 ", " ")
    if seconds < _MINUTE:
        return f"{seconds:.0f} s"
    for unit, name, longest in ((_MINUTE, "min", _HOUR), (_HOUR, "h", _DAY)):
        if seconds < longest:
            return f"{seconds / unit:.1f} {name}".replace(".0 ", " ")
    return f"{seconds / _DAY:.1f} days".replace(".0 ", " ")
