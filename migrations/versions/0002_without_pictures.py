"""References may have no thumbnail: their pictures are at a public address only."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.alter_column("reference_image", "thumbnail", nullable=True)
    op.execute("update reference_image set thumbnail = null where octet_length(thumbnail) = 0")  # of a downgrade


def downgrade() -> None:
    op.execute("update reference_image set thumbnail = '' where thumbnail is null")
    op.alter_column("reference_image", "thumbnail", nullable=False)
