"""What the interfaces need: uploads, webhooks, workers' reports, and predictions that are dropped, joined, deleted.

Knows how to make them on SQLite and PostgreSQL.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add columns, tables and indexes."""
    op.add_column("keys", sa.Column("webhook_secret", sa.Text))  # needed in clear: it signs
    _predictions()
    _attempts()
    _uploads()
    _webhooks()
    _workers()


def _predictions() -> None:
    for column in (
        sa.Column("body_hash", sa.Text),  # SHA-256 of model and body, to tell a request that is sent again
        sa.Column("holders", sa.Integer, nullable=False, server_default="0"),  # synchronous requests that wait for it
        sa.Column("dropped_at", sa.BigInteger),  # when the last of them hung up
        sa.Column("withdrawn", sa.Boolean, nullable=False, server_default=sa.false()),  # no worker is to take it
        sa.Column("deleted_at", sa.BigInteger),  # its owner sees it no more
        sa.Column("expired_at", sa.BigInteger),  # its pictures are gone
        sa.Column("webhook_url", sa.Text),
        sa.Column("preview", sa.Text),  # base64 of a small JPEG, while it runs
    ):
        op.add_column("predictions", column)
    op.create_index("predictions_of_key", "predictions", ["key_id", "created_at", "id"])
    op.drop_index("predictions_waiting_of_key", "predictions")
    _partial_index("predictions_waiting_of_key", "predictions", ["key_id", "withdrawn"], "status = 'created'")
    op.create_index("predictions_of_body", "predictions", ["body_hash", "key_id"])
    _partial_index("predictions_withdrawn", "predictions", "dropped_at", "withdrawn")
    _partial_index("predictions_to_expire", "predictions", "finished_at", "expired_at is null")
    _partial_index("predictions_to_purge", "predictions", "deleted_at", "deleted_at is not null")


def _attempts() -> None:
    op.add_column("attempts", sa.Column("swept_at", sa.BigInteger))  # what it left behind was looked for then
    _partial_index("attempts_to_sweep", "attempts", "ended_at", "outcome <> 'ok' and swept_at is null")


def _partial_index(name: str, table: str, columns: str | list[str], where: str) -> None:
    columns = [columns] if isinstance(columns, str) else columns
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


def _uploads() -> None:
    op.create_table(
        "uploads",
        sa.Column("id", sa.Text, primary_key=True),  # 32 random hexadecimal digits: the secret of its download URL
        sa.Column("key_id", sa.Text, sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("ticket_hash", sa.Text, unique=True),  # SHA-256 of the secret that lets one PUT happen
        sa.Column("filename", sa.Text, nullable=False),
        sa.Column("blob", sa.Text),  # its file; null until it came whole
        sa.Column("content_type", sa.Text),  # found in the bytes; null until they came
        sa.Column("size", sa.BigInteger, nullable=False, server_default="0"),  # bytes
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("received_at", sa.BigInteger),
    )
    op.create_index("uploads_of_key", "uploads", ["key_id", "created_at"])
    op.create_index("uploads_by_age", "uploads", ["created_at"])


def _webhooks() -> None:
    op.create_table(
        "webhooks",
        sa.Column("id", sa.Text, primary_key=True),  # the header webhook-id
        sa.Column("prediction_id", sa.Text, sa.ForeignKey("predictions.id"), nullable=False, unique=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
        sa.Column("run_after", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("last_error", sa.Text, nullable=False, server_default=""),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("delivered_at", sa.BigInteger),
        sa.Column("given_up_at", sa.BigInteger),
    )
    _partial_index("webhooks_due", "webhooks", "run_after", "delivered_at is null and given_up_at is null")


def _workers() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("host", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
        sa.Column("stats", sa.Text, nullable=False, server_default="{}"),  # JSON: counters since its start
    )
