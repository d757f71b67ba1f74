"""Alembic's entry: runs on the connection it is handed, or on the database of the settings."""

from alembic import context
from sqlalchemy import Connection

from indexer.database.tables import Base


def run(connection: Connection) -> None:
    """Run the chosen migrations inside the connection's transaction."""
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        context.run_migrations()


handed: Connection | None = context.config.attributes.get("connection")
if handed is not None:
    run(handed)
else:
    from indexer.database.connection import connect
    from indexer.settings import Settings

    with connect(Settings.read(), check=False).connect() as own:
        run(own)
