"""Reads ``sql/*.sql`` into named statements for one dialect.

Knows the files' form and where SQLite and PostgreSQL differ. Knows nothing of connections or of what a statement does.

Each statement stands under a line ``-- name --`` and a sentence. One text serves both databases; where they differ
stands a ``$name``, filled in here. Times are whole milliseconds since 1970 by the database's own clock (``$now``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from string import Template
from typing import Final

from sqlalchemy import TextClause, text

_HEADING: Final = re.compile(r"^-- (\w+) --$", re.MULTILINE)

# What both dialects say alike and several statements need.
SHARED: Final[Mapping[str, str]] = {
    "key_columns": "id, name, prefix, created_at, disabled_at, expires_at, expires_at <= $now as expired, scopes,"
    " rate_per_minute, max_running, max_queued, daily_pictures, weight",
    # Keys that may run only so many jobs at once, and how many more each may begin now.
    "places": "(select k.id as key_id, coalesce(k.max_running, k.default_running) - (select count(*)"
    " from predictions r where r.key_id = k.id and r.status = 'processing') as places"
    " from keys k where coalesce(k.max_running, k.default_running) > 0)",
}

DIALECTS: Final[Mapping[str, Mapping[str, str]]] = {
    "sqlite": {
        "now": "cast(round(unixepoch('subsec') * 1000) as integer)",
        "greatest": "max",
        "listed_ids": "(select value from json_each(:ids))",
        "for_update": "",  # BEGIN IMMEDIATE has locked the whole file already
        "skip_locked": "",
        "is_due": "in (select id from due)",
        "turn": "1",
        "missing_loras": "(select count(*) from json_each(due.lora_key) as needed"
        " where needed.value not in (select value from json_each(:loaded)))",
    },
    "postgresql": {
        "now": "cast(extract(epoch from statement_timestamp()) * 1000 as bigint)",
        "greatest": "greatest",
        "listed_ids": "(select json_array_elements_text(cast(:ids as json)))",
        "for_update": "for update",
        "skip_locked": "for update of p skip locked",
        "is_due": "= any(array(select id from due))",
        "turn": "pg_advisory_xact_lock(442804593)",  # a number of ours; held to the end of the transaction
        "missing_loras": "(select count(*) from json_array_elements_text(cast(due.lora_key as json)) as needed(value)"
        " where needed.value not in (select json_array_elements_text(cast(:loaded as json))))",
    },
}


@cache
def queries(dialect: str) -> Mapping[str, TextClause]:
    """Return every statement of ``sql/*.sql`` by name, ready for ``"sqlite"`` or ``"postgresql"``."""
    statements: dict[str, TextClause] = {}
    for file in sorted(files(__package__).joinpath("sql").iterdir(), key=lambda file: file.name):
        _preamble, *parts = _HEADING.split(file.read_text("utf-8"))
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            if name in statements:
                raise ValueError(f"two statements have the name {name}")
            statements[name] = _statement(body, dialect)
    return statements


def _statement(body: str, dialect: str) -> TextClause:
    """Drop the comment and the final semicolon, and fill in the dialect's words."""
    lines = [line for line in body.strip().splitlines() if not line.startswith("--")]
    shared = {name: Template(words).safe_substitute(DIALECTS[dialect]) for name, words in SHARED.items()}
    return text(Template("\n".join(lines)).substitute(shared, **DIALECTS[dialect]).removesuffix(";"))
