"""Alembic's entry point: runs revisions on the connection that ``database.upgrade`` hands over.

Knows where that connection is. Knows no URL and no settings; the caller owns the transaction.
"""

from alembic import context

context.configure(connection=context.config.attributes["connection"])
context.run_migrations()
