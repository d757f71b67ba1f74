"""Each revision has a random nonce: restored backups reach the same numbers by other histories."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "timeline",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("nonce", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_timeline_checkpoint_id_checkpoint", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "revision", name="pk_timeline"),
    )
    op.execute(
        "insert into timeline (checkpoint_id, revision) "
        "select checkpoint_id, revision from index_revision where revision > 0"
    )


def downgrade() -> None:
    op.drop_table("timeline")
