"""The first tables: keys, predictions, attempts, events.

Knows how to make them on SQLite and PostgreSQL. Knows nothing of later changes.

Times are whole milliseconds since 1970 by the database's clock. JSON is text: the store never looks inside it.
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")  # SQLite numbers rows only in INTEGER columns


def upgrade() -> None:
    """Make the tables and their indexes."""
    _keys()
    _predictions()
    _attempts()
    _events()


def _keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("prefix", sa.Text, nullable=False),  # first characters of the secret, to tell keys apart
        sa.Column("secret_hash", sa.Text, nullable=False, unique=True),  # SHA-256, hexadecimal
        sa.Column("vtime", sa.Double, nullable=False, server_default="0"),  # fair tag of the key's last job
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("disabled_at", sa.BigInteger),
    )
    active = sa.text("disabled_at is null")
    op.create_index("keys_name", "keys", ["name"], unique=True, sqlite_where=active, postgresql_where=active)


def _predictions() -> None:
    op.create_table(
        "predictions",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("key_id", sa.Text, sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("pool", sa.Text, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("priority", sa.Integer, nullable=False),
        sa.Column("fair", sa.Double, nullable=False),  # virtual time at which the job is due to be done
        sa.Column("lora_key", sa.Text, nullable=False),  # JSON list
        sa.Column("input", sa.Text, nullable=False),  # JSON
        sa.Column("seed", sa.BigInteger, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),  # fencing token: only grows
        sa.Column("lease_owner", sa.Text),
        sa.Column("lease_until", sa.BigInteger),
        sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("progress", sa.Text, nullable=False, server_default="{}"),  # JSON
        sa.Column("outputs", sa.Text, nullable=False, server_default="[]"),  # JSON
        sa.Column("error", sa.Text, nullable=False, server_default=""),
        sa.Column("error_class", sa.Text, nullable=False, server_default=""),
        sa.Column("timings", sa.Text, nullable=False, server_default="{}"),  # JSON, milliseconds
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("finished_at", sa.BigInteger),
        sa.UniqueConstraint("key_id", "idempotency_key"),
    )
    waiting, held = sa.text("status = 'created'"), sa.text("status = 'processing'")
    _partial_index("predictions_waiting", ["pool", sa.text("priority desc"), "fair", "id"], waiting)
    _partial_index("predictions_waiting_of_key", ["key_id"], waiting)
    _partial_index("predictions_leases", ["lease_until"], held)


def _partial_index(name: str, columns: Sequence[str | sa.TextClause], where: sa.TextClause) -> None:
    op.create_index(name, "predictions", columns, sqlite_where=where, postgresql_where=where)


def _attempts() -> None:
    op.create_table(
        "attempts",
        sa.Column("prediction_id", sa.Text, sa.ForeignKey("predictions.id"), primary_key=True),
        sa.Column("attempt", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("ended_at", sa.BigInteger),
        sa.Column("outcome", sa.Text),
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("seq", SEQUENCE, primary_key=True, autoincrement=True),
        sa.Column("prediction_id", sa.Text, sa.ForeignKey("predictions.id"), nullable=False),
        sa.Column("type", sa.Text, nullable=False),  # created, started, requeued, completed, failed, cancelled
        sa.Column("at", sa.BigInteger, nullable=False),
    )
    op.create_index("events_of_prediction", "events", ["prediction_id", "seq"])
