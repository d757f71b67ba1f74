"""Jobs: many images judged in the background."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("question", postgresql.JSONB(), nullable=False),
        sa.Column("images", sa.Integer(), nullable=False),
        *(
            sa.Column(name, sa.Integer(), server_default=sa.text("0"), nullable=False)
            for name in ("fake", "real", "uncertain", "failed")
        ),
        sa.Column("kept_bytes", sa.BigInteger(), nullable=False),
        sa.Column("api_key_id", sa.BigInteger(), nullable=True),
        sa.Column("webhook", sa.Text(), nullable=True),
        sa.Column("webhook_state", sa.Text(), nullable=True),
        sa.Column("webhook_error", sa.Text(), nullable=True),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["api_key_id"], ["api_key.id"], name="fk_job_api_key_id_api_key", ondelete="SET NULL"),
        sa.PrimaryKeyConstraint("id", name="pk_job"),
    )
    op.create_index("ix_job_at_id", "job", ["at", "id"])
    op.create_index("ix_job_unfinished", "job", ["at"], postgresql_where=sa.text("ended_at is null"))
    op.create_index("ix_job_untold", "job", ["ended_at"], postgresql_where=sa.text("webhook_state = 'pending'"))
    op.create_table(
        "job_image",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("fetched", sa.Boolean(), nullable=False),
        sa.Column("file_bytes", sa.BigInteger(), nullable=True),
        sa.Column("bytes", sa.LargeBinary(), nullable=True),
        sa.Column("attempts", sa.SmallInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("leased_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_job_image_job_id_job", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name="pk_job_image"),
    )
    op.create_index(
        "ix_job_image_waiting",
        "job_image",
        ["fetched", "number", "job_id"],
        postgresql_where=sa.text("result is null"),
    )
    # Compressed already: do not try again on every insert.
    op.execute("alter table job_image alter column bytes set storage external")


def downgrade() -> None:
    op.drop_table("job_image")
    op.drop_table("job")
