"""The verdicts of one key are found without reading all others'."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_detection_api_key_id_at_id", "detection", ["api_key_id", "at", "id"])


def downgrade() -> None:
    op.drop_index("ix_detection_api_key_id_at_id", "detection")
