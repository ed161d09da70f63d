"""Predictions are found by when they ended: for retention, and for how fast the queue moves.

Knows how to add the index on SQLite and PostgreSQL.
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the index."""
    ended = sa.text("finished_at is not null")
    op.create_index("predictions_by_end", "predictions", ["finished_at"], sqlite_where=ended, postgresql_where=ended)
