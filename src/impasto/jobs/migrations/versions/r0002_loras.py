"""Predictions keep the report on each of their LoRAs.

Knows how to add the column on SQLite and PostgreSQL; jobs from before have no reports.
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    op.add_column("predictions", sa.Column("loras", sa.Text, nullable=False, server_default="[]"))  # JSON list
