"""Thumbnails and kept uploads may lie in object storage."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("reference_file", sa.Column("sha256", sa.LargeBinary(), nullable=True))
    op.alter_column("reference_file", "bytes", nullable=True)
    op.create_check_constraint(
        op.f("ck_reference_file_bytes_or_sha256"), "reference_file", "num_nonnulls(bytes, sha256) = 1"
    )
    op.create_index(
        "ix_reference_file_sha256", "reference_file", ["sha256"], postgresql_where=sa.text("sha256 is not null")
    )
    op.create_table(
        "blob_outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_blob_outbox"),
    )
    # Last: from here on, who reads references waits for the transaction's end.
    op.add_column("reference_image", sa.Column("thumbnail_sha256", sa.LargeBinary(), nullable=True))
    op.create_index(
        "ix_reference_image_thumbnail_sha256",
        "reference_image",
        ["thumbnail_sha256"],
        postgresql_where=sa.text("thumbnail_sha256 is not null"),
    )


def downgrade() -> None:
    # What lies in object storage is lost to the rows: export before, import afterwards.
    op.drop_table("blob_outbox")
    op.execute("delete from reference_file where bytes is null")
    op.drop_constraint(op.f("ck_reference_file_bytes_or_sha256"), "reference_file")
    op.drop_column("reference_file", "sha256")
    op.alter_column("reference_file", "bytes", nullable=False)
    op.drop_column("reference_image", "thumbnail_sha256")
