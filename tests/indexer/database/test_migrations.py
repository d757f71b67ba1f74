"""The schema: models and migrations agree, and every step goes up and down."""

from pathlib import Path

from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from indexer.database.connection import alembic_config, migrate, schema_revision
from indexer.settings import Settings

ROOT = Path(__file__).parents[3]


def test_models_equal_migrations(database_url: str) -> None:
    config = alembic_config()
    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.check(config)  # raises with the differences
    engine.dispose()


def test_every_step_goes_up_and_down(settings: Settings) -> None:
    assert settings.database_url is not None
    engine = create_engine(settings.database_url.replace("postgresql://", "postgresql+psycopg://"))
    steps = [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]
    migrate(engine, "base")
    with engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    for step in steps:
        migrate(engine, step)
        with engine.connect() as connection:
            assert schema_revision(connection) == step
    for step in steps[-2::-1]:
        migrate(engine, step)
    migrate(engine, "base")
    migrate(engine)
    migrate(engine)  # again: nothing to do
    with engine.connect() as connection:
        assert connection.scalar(text("select count(*) from store")) == 1
    engine.dispose()
