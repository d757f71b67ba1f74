"""Jobs take turns, and a call that is repeated with its key makes none twice."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UNFINISHED = sa.text("ended_at is null")
WAITING = sa.text("result is null")


def upgrade() -> None:
    now = sa.text("clock_timestamp()")
    op.add_column("job", sa.Column("taken_at", sa.DateTime(timezone=True), server_default=now, nullable=False))
    op.add_column("job", sa.Column("idempotency_key", sa.Text(), nullable=True))
    op.create_index(
        "uq_job_idempotency_key", "job", [sa.text("coalesce(api_key_id, 0)"), "idempotency_key"], unique=True
    )
    op.drop_index("ix_job_unfinished", "job")
    op.create_index("ix_job_unfinished", "job", ["taken_at", "id"], postgresql_where=UNFINISHED)
    op.drop_index("ix_job_image_waiting", "job_image")
    op.create_index("ix_job_image_waiting", "job_image", ["job_id", "fetched", "number"], postgresql_where=WAITING)


def downgrade() -> None:
    op.drop_index("ix_job_image_waiting", "job_image")
    op.create_index("ix_job_image_waiting", "job_image", ["fetched", "number", "job_id"], postgresql_where=WAITING)
    op.drop_index("ix_job_unfinished", "job")
    op.create_index("ix_job_unfinished", "job", ["at"], postgresql_where=UNFINISHED)
    op.drop_index("uq_job_idempotency_key", "job")
    op.drop_column("job", "idempotency_key")
    op.drop_column("job", "taken_at")
