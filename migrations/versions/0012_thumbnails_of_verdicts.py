"""Thumbnails of verdicts may lie in object storage."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("detection", sa.Column("thumbnail_sha256", sa.LargeBinary(), nullable=True))
    op.create_index(
        "ix_detection_thumbnail_sha256",
        "detection",
        ["thumbnail_sha256"],
        postgresql_where=sa.text("thumbnail_sha256 is not null"),
    )
    op.create_index(
        "ix_detection_with_thumbnail", "detection", ["id"], postgresql_where=sa.text("thumbnail is not null")
    )


def downgrade() -> None:
    # What lies in object storage is lost to the rows.
    op.drop_index("ix_detection_with_thumbnail", "detection")
    op.drop_column("detection", "thumbnail_sha256")
