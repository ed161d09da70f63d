"""What a key may do and how much: scopes, an end, a weight, limits, and what it has used of them.

Knows how to add the columns on SQLite and PostgreSQL; keys from before may do everything, as the settings limit it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add columns and an index."""
    for column in (
        sa.Column("scopes", sa.Text, nullable=False, server_default="generate read metrics"),  # words
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("weight", sa.Double, nullable=False, server_default="1"),  # share of the workers, beside others
        sa.Column("rate_per_minute", sa.Integer),  # limits: null is the setting's, 0 is none
        sa.Column("max_running", sa.Integer),
        sa.Column("max_queued", sa.Integer),
        sa.Column("daily_pictures", sa.Double),  # default pictures' worth of work
        sa.Column(
            "default_running", sa.Integer, nullable=False, server_default="0"
        ),  # the setting max_running where its last job came in
        sa.Column(
            "rate_at", sa.Double, nullable=False, server_default="0"
        ),  # milliseconds: its requests so far are paid for up to then
        sa.Column(
            "spent", sa.Double, nullable=False, server_default="0"
        ),  # default pictures' worth, on the day spent_on
        sa.Column("spent_on", sa.BigInteger, nullable=False, server_default="0"),  # days since 1970, UTC
    ):
        op.add_column("keys", column)
    running = sa.text("status = 'processing'")
    op.create_index(
        "predictions_running_of_key", "predictions", ["key_id"], sqlite_where=running, postgresql_where=running
    )
