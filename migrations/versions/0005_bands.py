"""Near duplicates are found by bands of their fingerprints, and samples of a kind by their hashes, without a scan."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Every third bit, from the first, second and third on.
BANDS = (-7905747460161236407, 2635249153387078802, 5270498306774157604)


def upgrade() -> None:
    for number, band in enumerate(BANDS):
        op.create_index(
            f"ix_reference_image_fingerprint_band_{number}",
            "reference_image",
            [sa.literal_column(f"(nullif(fingerprint, 0) & '{band}'::bigint)")],
        )
    op.create_index(
        "ix_reference_image_kind_sha256",
        "reference_image",
        ["label", sa.literal_column("coalesce(generator_id, 0)"), "sha256"],
    )
    op.drop_index("ix_reference_image_label_generator_id", "reference_image")
    op.execute("analyze reference_image")  # or the planner would take an expression for one with few values


def downgrade() -> None:
    op.create_index("ix_reference_image_label_generator_id", "reference_image", ["label", "generator_id"])
    op.drop_index("ix_reference_image_kind_sha256", "reference_image")
    for number in range(len(BANDS)):
        op.drop_index(f"ix_reference_image_fingerprint_band_{number}", "reference_image")
