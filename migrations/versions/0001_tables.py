"""The first tables."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "api_key",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_api_key"),
        sa.UniqueConstraint("hash", name="uq_api_key_hash"),
        sa.UniqueConstraint("name", name="uq_api_key_name"),
    )
    op.create_table(
        "blocked_hash",
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("sha256", name="pk_blocked_hash"),
    )
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("dim", sa.Integer(), nullable=False),
        sa.Column("config", postgresql.JSONB(), nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoint"),
    )
    op.create_index("uq_checkpoint_active", "checkpoint", ["active"], unique=True, postgresql_where=sa.text("active"))
    op.create_table(
        "generator",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("family", sa.Text(), nullable=True),
        sa.Column("vendor", sa.Text(), nullable=True),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("released_on", sa.Date(), nullable=True),
        sa.Column("notes", sa.Text(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_generator"),
    )
    op.create_index("uq_generator_name", "generator", [sa.literal_column("lower(name)")], unique=True)
    op.create_table(
        "store",
        sa.Column("id", sa.Uuid(), server_default=sa.text("gen_random_uuid()"), nullable=False),
        sa.Column("single", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.CheckConstraint("single", name=op.f("ck_store_single")),
        sa.PrimaryKeyConstraint("id", name="pk_store"),
        sa.UniqueConstraint("single", name="uq_store_single"),
    )
    op.create_table(
        "calibration",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("heads_id", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("params", postgresql.JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_calibration_checkpoint_id_checkpoint", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "heads_id", "revision", name="pk_calibration"),
    )
    op.create_table(
        "detection",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("file_bytes", sa.BigInteger(), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("result", postgresql.JSONB(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("heads_id", sa.Text(), nullable=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.Column("api_key_id", sa.BigInteger(), nullable=True),
        sa.Column("feedback", postgresql.JSONB(), nullable=True),
        sa.ForeignKeyConstraint(
            ["api_key_id"], ["api_key.id"], name="fk_detection_api_key_id_api_key", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_detection"),
    )
    op.create_index("ix_detection_at_id", "detection", ["at", "id"], unique=False)
    op.create_index("ix_detection_sha256", "detection", ["sha256"], unique=False)
    op.create_table(
        "enrolment",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("generator_id", sa.BigInteger(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("report", postgresql.JSONB(), nullable=True),
        sa.ForeignKeyConstraint(
            ["generator_id"], ["generator.id"], name="fk_enrolment_generator_id_generator", ondelete="SET NULL"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_enrolment"),
    )
    op.create_table(
        "index_revision",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("revision", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_index_revision_checkpoint_id_checkpoint", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name="pk_index_revision"),
    )
    op.create_table(
        "removal",
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("image_id", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_removal_checkpoint_id_checkpoint", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "image_id", name="pk_removal"),
    )
    op.create_index("ix_removal_checkpoint_id_revision", "removal", ["checkpoint_id", "revision"], unique=False)
    op.create_table(
        "reference_image",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.Column("label", sa.SmallInteger(), nullable=False),
        sa.Column("generator_id", sa.BigInteger(), nullable=True),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("group", sa.Text(), nullable=False),
        sa.Column("uri", sa.Text(), nullable=True),
        sa.Column("file_bytes", sa.BigInteger(), nullable=False),
        sa.Column("mtime", sa.Double(), nullable=True),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("jpeg_quality", sa.SmallInteger(), nullable=True),
        sa.Column("fingerprint", sa.BigInteger(), nullable=True),
        sa.Column("thumbnail", sa.LargeBinary(), nullable=False),
        sa.Column("attributes", postgresql.JSONB(), nullable=False),
        sa.Column("enrolment_id", sa.BigInteger(), nullable=True),
        sa.Column("added_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("label = 1 or generator_id is null", name=op.f("ck_reference_image_real_has_no_generator")),
        sa.CheckConstraint("label in (0, 1)", name=op.f("ck_reference_image_label")),
        sa.ForeignKeyConstraint(
            ["enrolment_id"], ["enrolment.id"], name="fk_reference_image_enrolment_id_enrolment", ondelete="SET NULL"
        ),
        sa.ForeignKeyConstraint(["generator_id"], ["generator.id"], name="fk_reference_image_generator_id_generator"),
        sa.PrimaryKeyConstraint("id", name="pk_reference_image"),
        sa.UniqueConstraint("sha256", name="uq_reference_image_sha256"),
    )
    op.create_index("ix_reference_image_enrolment_id", "reference_image", ["enrolment_id"], unique=False)
    op.create_index("ix_reference_image_generator_id_id", "reference_image", ["generator_id", "id"], unique=False)
    op.create_index("ix_reference_image_label_generator_id", "reference_image", ["label", "generator_id"], unique=False)
    op.create_index("ix_reference_image_source_id", "reference_image", ["source", "id"], unique=False)
    op.create_index("ix_reference_image_group", "reference_image", ["group"], unique=False, postgresql_using="hash")
    op.create_index("ix_reference_image_uri", "reference_image", ["uri"], unique=False, postgresql_using="hash")
    op.create_table(
        "embedding",
        sa.Column("image_id", sa.BigInteger(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"], ["checkpoint.id"], name="fk_embedding_checkpoint_id_checkpoint", ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["image_id"], ["reference_image.id"], name="fk_embedding_image_id_reference_image", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("image_id", "checkpoint_id", name="pk_embedding"),
    )
    op.create_index(
        "ix_embedding_checkpoint_id_revision_image_id",
        "embedding",
        ["checkpoint_id", "revision", "image_id"],
        unique=False,
    )
    op.create_table(
        "reference_file",
        sa.Column("image_id", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["image_id"], ["reference_image.id"], name="fk_reference_file_image_id_reference_image", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("image_id", name="pk_reference_file"),
    )

    # Compressed already: do not try again on every insert.
    op.execute("alter table reference_image alter column thumbnail set storage external")
    op.execute("alter table reference_file alter column bytes set storage external")
    op.execute("insert into store default values")


def downgrade() -> None:
    op.drop_table("reference_file")
    op.drop_table("embedding")
    op.drop_table("reference_image")
    op.drop_table("removal")
    op.drop_table("index_revision")
    op.drop_table("enrolment")
    op.drop_table("detection")
    op.drop_table("calibration")
    op.drop_table("store")
    op.drop_table("generator")
    op.drop_table("checkpoint")
    op.drop_table("blocked_hash")
    op.drop_table("api_key")
