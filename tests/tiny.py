"""A training run small enough for tests."""

from pathlib import Path

from trainer.fit.fit_settings import FitSettings

TINY = '{"depth": 2, "embed_dim": 48, "img_size": 32, "num_heads": 3, "patch_size": 8}'


def tiny_settings(data: Path, output: Path) -> FitSettings:
    """Two epochs of three updates of a tiny ViT, made in this process."""
    return FitSettings(
        data=data,
        output=output,
        image_size=32,
        architecture_args=TINY,
        batch_size=4,
        epoch_steps=3,
        epochs=2,
        warmup_epochs=1,
        patience=0,
        workers=0,
        head_images=200,
        device="cpu",
    )


def tiny_command(data: Path, output: Path) -> list[str]:
    """The arguments of `lineup train` for one such epoch."""
    options = {"image-size": 32, "batch-size": 4, "epoch-steps": 3, "epochs": 1, "workers": 0, "head-images": 200}
    command = ["fit", "--data", str(data), "--output", str(output), "--architecture-args", TINY, "--json"]
    return [
        *command,
        "--device",
        "cpu",
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]
