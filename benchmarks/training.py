"""Speed of the view pipeline and of the training step, against a re-enactment of the reference pipeline.

    python -m benchmarks.training [--image-size 224] [--local-size 96] [--records 32] [--device cpu] [--compile]

Both sides get the same decoded images and take turns in one run, so the ratios hold on a machine that is not idle.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.pillow_views import PillowViews
from benchmarks.targets import Target
from trainer.fit.fit_settings import FitSettings
from trainer.fit.loss import code_loss, derangement
from trainer.fit.objective import Objective, make_objective
from trainer.fit.run import Processes, Run
from trainer.views.augmentations import Augmenter, Pixels
from trainer.views.views import Views


def source_images(count: int) -> list[Pixels]:
    """Textured images of 256 to 640 pixels, as photographs of the web have."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        height, width = rng.integers(256, 641, 2)
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (int(width), int(height)), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        images.append(np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8))
    return images


def best_of(rounds: int, sides: Mapping[str, Callable[[], object]], clock: Callable[[], float]) -> dict[str, float]:
    """Least seconds of each side over some rounds in which the sides take turns."""
    for side in sides.values():
        side()
    seconds = {name: float("inf") for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            started = clock()
            side()
            seconds[name] = min(seconds[name], clock() - started)
    return seconds


def time_views(settings: FitSettings, images: list[Pixels], rounds: int) -> dict[str, float]:
    """Views per second of one core, of images that are decoded already.

    `lineup` keeps the plain views of a data set that fits into memory; the reference makes them anew each time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = Views(settings.preprocessing, settings.local, Augmenter(settings.image_size))
    theirs = PillowViews(settings.image_size, settings.local)
    pictures = [Image.fromarray(image) for image in images]
    plains = [np.asarray(settings.preprocessing.crop(picture)) for picture in pictures]

    def fast() -> None:
        rng = np.random.default_rng(0)
        for image, view in zip(images, plains, strict=True):
            ours.image(image, view, rng)

    def fast_without_memory() -> None:
        rng = np.random.default_rng(0)
        for image, picture in zip(images, pictures, strict=True):
            ours.image(image, np.asarray(settings.preprocessing.crop(picture)), rng)

    def slow() -> None:
        for picture in pictures:
            theirs(picture)

    sides = {"lineup": fast, "lineup, nothing kept": fast_without_memory, "reference": slow}
    seconds = best_of(rounds, sides, time.process_time)
    torch.set_num_threads(threads)
    return {name: 4 * len(images) / value for name, value in seconds.items()}


def time_steps(settings: FitSettings, device: str, rounds: int, compiled: bool) -> dict[str, float]:
    """Records per second of a training step."""
    seconds = best_of(rounds, training_steps(settings, device, compiled), time.perf_counter)
    return {name: settings.batch_size / value for name, value in seconds.items()}


def training_steps(settings: FitSettings, device: str, compiled: bool = False) -> dict[str, Callable[[], None]]:
    """A training step of each side: forward, loss, backward, update; views are at hand.

    `compiled` gives ours once more with the backbone through torch.compile.
    """
    records = settings.batch_size
    generator = torch.Generator().manual_seed(0)
    size, local_size = settings.image_size, settings.local
    whole = torch.randint(0, 256, (records, 3, 2, size, size, 3), generator=generator, dtype=torch.uint8)
    local = torch.randint(0, 256, (records, 2, local_size, local_size, 3), generator=generator, dtype=torch.uint8)
    backbone, optimiser, scaler = reference_model(settings, device)
    wholes = (whole.permute(1, 2, 0, 5, 3, 4).flatten(0, 2).float() / 255).to(device)  # (3 * 2 * n, 3, s, s)
    locals_ = (local.permute(1, 0, 4, 2, 3).flatten(0, 1).float() / 255).to(device)  # (2 * n, 3, l, l)

    def ours(compiled: bool) -> Callable[[], None]:
        objective: Objective = make_objective(settings, device)[0]
        if compiled:
            objective.backbone.compile(dynamic=False)
        run = Run(settings, Processes(), device, objective, 1)

        def step() -> None:
            torch.set_num_threads(1 if run.slices else torch.get_num_threads())
            run.step((whole, local, [], []), torch.Generator().manual_seed(0), 1e-5)

        return step

    def slow() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        with torch.autocast(device, torch.float16, enabled=device == "cuda"):
            embeddings = torch.cat([backbone(wholes), backbone(locals_)]).float()
        plain_, augmented, global_crop, local_crop = embeddings.view(4, 2, records, -1)
        other = derangement(records, torch.Generator().manual_seed(0)).to(device)
        loss = code_loss(plain_, augmented, global_crop, local_crop, other)
        optimiser.zero_grad()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimiser)
        scaler.update()
        loss.item()

    return {"lineup": ours(False)} | ({"lineup, compiled": ours(True)} if compiled else {}) | {"reference": slow}


def reference_model(
    settings: FitSettings, device: str
) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler]:
    """The same backbone, trained as the reference code does: AdamW without fusion, fp16 with a scaler on a GPU."""
    objective: Objective = make_objective(replace(settings, precision="float32"), device)[0]
    for module in objective.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", True)  # noqa: B010 - timm's default, which our CPU path turns off
    optimiser = torch.optim.AdamW(objective.parameters(), lr=1e-5)
    return objective.backbone, optimiser, torch.amp.GradScaler(device, enabled=device == "cuda")


def main(arguments: Sequence[str] = ()) -> list[Target]:
    """Print a table; what is wanted of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=None)
    parser.add_argument("--records", type=int, default=16)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too; on a CPU it needs a compiler")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    settings = FitSettings(
        data=Path("none"),
        output=Path("none"),
        image_size=asked.image_size,
        local_size=asked.local_size,
        batch_size=asked.records,
    )
    tables = {
        "views/s per core": time_views(settings, source_images(asked.images), asked.rounds),
        "training records/s": time_steps(settings, asked.device, asked.rounds, asked.compile),
    }
    views, steps = tables.values()
    cores = os.cpu_count() or 1
    if asked.device == "cpu":
        tables[f"records/s end to end on {cores} cores, computed of both"] = {
            side: 1 / (8 / value / cores + 1 / steps["reference" if side == "reference" else "lineup"])
            for side, value in views.items()
        }
    times = steps["lineup"] / steps["reference"]
    targets = [Target("training step, times as many records as the reference", times, 1.5)]
    if asked.json:
        print(json.dumps(tables))
        return targets
    print(f"{asked.image_size} px, local {settings.local} px, {asked.records} records per step, {asked.device}\n")
    print("| measure | side | value | times the reference |\n| --- | --- | --- | --- |")
    for measure, values in tables.items():
        for side, value in values.items():
            print(f"| {measure} | {side} | {value:.1f} | {value / values['reference']:.2f} |")
    return targets


if __name__ == "__main__":
    main(sys.argv[1:])
