"""References are counted as they come and go."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "reference_count",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("label", sa.SmallInteger(), nullable=False),
        sa.Column("generator_id", sa.BigInteger(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("images", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["generator_id"], ["generator.id"], name="fk_reference_count_generator_id_generator", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_reference_count"),
    )
    op.create_index(
        "uq_reference_count_kind",
        "reference_count",
        ["label", sa.literal_column("coalesce(generator_id, 0)"), "source"],
        unique=True,
    )
    op.add_column("enrolment", sa.Column("images", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.execute("lock table index_revision in exclusive mode")  # writers, who do not count yet, have ended
    op.execute(
        "insert into reference_count (label, generator_id, source, images) "
        "select label, generator_id, source, count(*) from reference_image group by label, generator_id, source"
    )
    op.execute(
        "update enrolment e set images = counted.images from "
        "(select enrolment_id, count(*) as images from reference_image group by enrolment_id) counted "
        "where counted.enrolment_id = e.id"
    )


def downgrade() -> None:
    op.drop_column("enrolment", "images")
    op.drop_table("reference_count")
