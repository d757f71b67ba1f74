"""The settings of a training run, which are the options of `lineup train fit`, and the learning rate they give."""

import json
import math
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Option

from trainer.data.entry import FIT_FORBIDDEN_SPLITS
from trainer.images import Preprocess
from trainer.model.checkpoint import FROZEN_STAGES, NETWORK_STAGES, is_network

REFERENCE_BATCH = 1024
"""Records per step for which the learning rate is stated."""
SPLIT_HELP = "Comma list; of 70 % of the groups where the data set names no splits. test and unseen are refused."
TIMM_TEACHER = "timm/"
Terms = Literal["both", "global", "multi-scale"]
Anchors = Literal["both", "real"]
Loss = Literal["infonce", "bce", "reference"]


class FitError(ValueError):
    """The settings or the data do not allow training; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    """Everything that decides the weights. Defaults are the paper's where it names a value.

    A field with an `Option` is an option of the command.
    """

    data: Annotated[Path, Option(help="Data set of any layout, or D3 shards.")]
    output: Annotated[Path, Option(help="Checkpoint folder to write.")]
    split: Annotated[str, Option(help=SPLIT_HELP)] = "train"
    name: Annotated[str, Option(help="Name of the checkpoint.")] = "code"
    image_size: Annotated[int, Option(help="Side in pixels of what the backbone reads.")] = 224
    local_size: Annotated[int | None, Option(help="Side of local crops; default 96 at 224.")] = None
    """The paper's text says 96 at 224, its code 224. By default 96, scaled with `image_size`."""
    architecture: Annotated[str, Option(help="A timm vision transformer.")] = "vit_tiny_patch16_224"
    architecture_args: Annotated[
        str,
        Option(
            help='JSON passed to timm, e.g. {"depth": 2}; ours is "stem": "conv", "residual", or a network of timm '
            'such as "tf_efficientnet_lite0".'
        ),
    ] = "{}"
    pretrained: Annotated[
        bool, Option(help="Start from timm's weights (ablation); of the stem, where that is a network of timm.")
    ] = False
    pretrained_file: Annotated[
        Path | None, Option(help="Safetensors file of those weights, where they cannot be fetched.")
    ] = None
    frozen_stages: Annotated[int, Option(help="First stages of such a stem that do not learn, 0 to 7.")] = FROZEN_STAGES
    """All seven: what it knows of photographs is kept whole, and more is told of generators that are new."""
    stem_rate: Annotated[float, Option(help="Learning rate of such a stem, as a share of the rest's.")] = 1.0
    """What it knows already is soon lost at a rate that teaches the rest. Below 1 its weights do not decay either."""
    preprocess: Annotated[
        Literal["center_crop", "resize_crop"], Option(help="resize_crop, or center_crop at native resolution.")
    ] = "resize_crop"
    """How images are brought to size in validation, heads, index and API."""
    windows: Annotated[
        int, Option(help="Windows that an image is judged by; more than 1 with center_crop, such as 5 or 9.")
    ] = 1
    """The embedding trains on single windows all the same."""
    scale: Annotated[Literal["resized", "native"], Option(help="Crops: resized (the paper) or native windows.")] = (
        "resized"
    )
    tokens: Annotated[int | None, Option(help="Patches per view fed in training, at most; default all.")] = None
    """They are drawn at random; outside of training all are fed. Fewer make a step cheaper, and large images
    affordable."""
    teacher: Annotated[
        str | None, Option(help="Network to learn features from: a .tflite, .onnx or .xml file, or timm/NAME.")
    ] = None
    """A file holds a convolutional classifier, which is cut before its global pooling."""
    teacher_weight: Annotated[float, Option(help="Of the distance to the teacher's features beside the loss.")] = 1.0
    teacher_until: Annotated[float, Option(help="Share of the schedule, 0 to 1, in which the teacher teaches.")] = 1.0
    augmentations: Annotated[int, Option(help="At most so many per view.")] = 2
    recompress: Annotated[float, Option(help="Chance that an image is recompressed before its views.")] = 0.0
    balance: Annotated[bool, Option(help="Draw sources and generators by the root of their size.")] = False
    """By default each real image comes in turn, and the generators alike often. Within a source or a generator the
    groups share alike."""
    paired: Annotated[float, Option(help="Chance that a fake is of the real image's group, where one is.")] = 0.0
    """Others are drawn from all groups."""
    batch_size: Annotated[int, Option(help="Records per step and process.")] = 32
    """The paper's is 1,024 over all GPUs."""
    cached_batch: Annotated[
        int | None, Option(help="Records per update where more than a step holds; in parts of --batch-size.")
    ] = None
    """Each part is computed twice, once for its embeddings and once for the gradient of a loss over all of them."""
    epoch_steps: Annotated[int | None, Option(help="Updates per epoch; default 1,700 or fewer.")] = None
    epochs: Annotated[int, Option(help="At most.")] = 150
    warmup_epochs: Annotated[float, Option(help="Of linear warm-up.")] = 5
    learning_rate: Annotated[float, Option(help="At 1,024 records per step.")] = 2e-3
    """It is scaled by the square root of the ratio to the records per step over all processes."""
    optimiser: Annotated[
        Literal["adamw", "muon"], Option(help="adamw; or muon for the blocks' matrices, which takes fewer updates.")
    ] = "adamw"
    weight_decay: Annotated[float, Option(help="Of matrices; biases and norms do not decay.")] = 2e-5
    temperature: Annotated[float, Option()] = 0.1
    terms: Annotated[Terms, Option(help="both, global or multi-scale (ablation).")] = "both"
    anchors: Annotated[Anchors, Option(help="both or real (ablation).")] = "both"
    loss: Annotated[Loss, Option(help="infonce; ablations: bce, or that of the reference code.")] = "infonce"
    """The reference code counts the real term twice and the fake term never."""
    positives: Annotated[
        Literal["label", "generator"], Option(help="Views drawn together: label (CoDE), or those of one generator.")
    ] = "label"
    """`generator` is the supervised contrastive loss over all views, with a class per generator and one for real."""
    proxies: Annotated[float, Option(help="Weight of a cross entropy over learnt centres of the generators.")] = 0.0
    """Its classes are those of `positives=generator`."""
    gather: Annotated[bool, Option(help="Negatives of all processes.")] = True
    clip: Annotated[
        float, Option(help="Largest norm of the gradient; 0 = any, as in the reference, which learnt more slowly here.")
    ] = 1.0
    """See BENCHMARKS.md, The optimiser."""
    ema: Annotated[float, Option(help="Decay of the weights' average; 0 = none.")] = 0.0
    """The average is updated with the weights, and is then what is kept."""
    patience: Annotated[int, Option(help="Epochs without improvement before stopping; 0 = never.")] = 6
    """Improvement is that of a linear head on validation images, and the best epoch's weights are kept. Without effect
    under `max_minutes`, whose schedule ends in time, and where there are no validation images of both labels: the last
    weights are kept."""
    max_minutes: Annotated[float | None, Option(help="Wall time, heads included, resumed or not.")] = None
    """A resumed run has what the finished epochs left of it."""
    seed: Annotated[int, Option()] = 42
    precision: Annotated[Literal["bf16", "float32"], Option(help="bf16 where the device has it, or float32.")] = "bf16"
    workers: Annotated[int | None, Option(help="Processes that make views.")] = None
    """By default half of the cores on a CPU, all but one beside a GPU."""
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto"
    head_images: Annotated[int, Option(help="Views the heads are fitted on, at most.")] = 50_000
    half: Annotated[bool, Option(help="Keep the weights in half precision: half the size.")] = False
    """They are rounded before the heads are fitted, which so belong to exactly these weights."""
    tensorboard: Annotated[Path | None, Option(help="Folder for TensorBoard's event files.")] = None
    cache_bytes: int = 4 << 30
    """Decoded images are kept in memory up to this size."""

    def __post_init__(self) -> None:
        splits = {part.strip() for part in self.split.split(",")}
        if forbidden := sorted(splits & set(FIT_FORBIDDEN_SPLITS)):
            raise FitError(
                f"split {', '.join(forbidden)} must not train anything: set --split to another, such as train"
            )
        if self.batch_size < 2:
            raise FitError(
                f"batch size {self.batch_size}: a positive comes from another record; set --batch-size to 2 or more"
            )
        if self.positives == "generator" and (self.loss, self.terms, self.anchors) != ("infonce", "both", "both"):
            raise FitError(
                f"--positives generator is a loss of its own: leave out --loss {self.loss}, --terms {self.terms} and "
                f"--anchors {self.anchors}"
            )
        if min(self.teacher_weight, self.proxies) < 0:
            raise FitError(
                f"--teacher-weight is {self.teacher_weight} and --proxies {self.proxies}: neither may be below 0"
            )
        if self.cached_batch is not None and self.cached_batch < self.batch_size:
            raise FitError(
                f"--cached-batch {self.cached_batch} is less than --batch-size {self.batch_size}, its part: raise it"
            )
        for size, option in ((self.image_size, "--image-size"), (self.local, "--local-size")):
            if size < self.patch or size % self.patch:
                raise FitError(f"{size} pixels are not whole patches of {self.patch}: change {option}")
        if self.windows > 1 and self.preprocess != "center_crop":
            raise FitError(f"--windows is {self.windows} with {self.preprocess}: add --preprocess center_crop")
        for value, option in (
            (self.windows, "--windows"),
            (self.epochs, "--epochs"),
            (self.max_minutes, "--max-minutes"),
            (self.epoch_steps, "--epoch-steps"),
            (self.tokens, "--tokens"),
        ):
            if value is not None and value <= 0:
                raise FitError(f"{option} is {value}: set it above 0")

        stem = self.timm_args.get("stem")
        if is_network(stem) and not self.pretrained:
            raise FitError(f"the stem {stem} keeps what it begins with in its first stages: add --pretrained")
        if not 0 <= self.frozen_stages <= NETWORK_STAGES:
            raise FitError(f"--frozen-stages is {self.frozen_stages}: set it to 0 to {NETWORK_STAGES}")
        if not 0 < self.stem_rate <= 1:
            raise FitError(f"--stem-rate is {self.stem_rate}: set it above 0 and to 1 at most")
        if (self.stem_rate, self.frozen_stages) != (1, FROZEN_STAGES) and not is_network(stem):
            raise FitError(
                f"--stem-rate {self.stem_rate} and --frozen-stages {self.frozen_stages} are for a stem that is a "
                "network of timm: leave them out, or name one in --architecture-args"
            )
        if self.pretrained and stem and not is_network(stem):
            raise FitError(
                "--pretrained: timm has no weights of a convolutional stem; drop it from --architecture-args"
            )
        if self.pretrained_file and not (self.pretrained and self.pretrained_file.is_file()):
            raise FitError(f"--pretrained-file {self.pretrained_file} is no file, or --pretrained is missing")
        if not 0 <= self.paired <= 1:
            raise FitError(f"--paired is {self.paired}: set it to a chance from 0 to 1")
        if not 0 < self.teacher_until <= 1:
            raise FitError(f"--teacher-until is {self.teacher_until}: set it above 0 and to 1 at most")
        if self.teacher and not self.teacher.startswith(TIMM_TEACHER) and not Path(self.teacher).is_file():
            raise FitError(
                f"--teacher {self.teacher} is no file: name one, or {TIMM_TEACHER}NAME for a network of timm"
            )

    @property
    def timm_args(self) -> dict[str, Any]:
        """What `architecture_args` says."""
        args: dict[str, Any] = json.loads(self.architecture_args)
        return args

    @property
    def records(self) -> int:
        """Records per update and process."""
        return self.cached_batch or self.batch_size

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        digits = self.architecture.partition("patch")[2].partition("_")[0]
        return int(self.timm_args.get("patch_size", digits or 1))

    @property
    def local(self) -> int:
        """Side of local crops in pixels."""
        patches = max(1, round(96 / 224 * self.image_size / self.patch))
        return self.local_size or patches * self.patch

    @property
    def knows_generators(self) -> bool:
        """Whether the loss tells generators apart."""
        return self.positives == "generator" or self.proxies > 0

    @property
    def preprocessing(self) -> Preprocess:
        """The checkpoint's preprocessing."""
        return Preprocess(mode=self.preprocess, image_size=self.image_size, windows=self.windows)

    def record(self) -> dict[str, Any]:
        """What the checkpoint says of its training: every setting that can change the weights, as JSON types."""
        irrelevant = {"output", "workers", "device", "cache_bytes", "architecture_args", "name", "tensorboard"}
        values = {key: value for key, value in asdict(self).items() if key not in irrelevant}
        values |= {"data": str(self.data), "local_size": self.local}
        if self.teacher and not self.teacher.startswith(TIMM_TEACHER):
            path = Path(self.teacher)
            values["teacher"] = f"{path.name}, sha256 {teacher_sha256(path)}"
        if self.pretrained_file:
            values["pretrained_file"] = f"{self.pretrained_file.name}, sha256 {teacher_sha256(self.pretrained_file)}"
        return values | ({"architecture_args": self.timm_args} if self.timm_args else {})


def teacher_sha256(path: Path) -> str:
    """SHA-256 of a teacher's file in hexadecimal; of an `.xml`, with the `.bin` beside it, which holds the weights."""
    digest = sha256(path.read_bytes())
    weights = path.with_suffix(".bin")
    if path.suffix == ".xml" and weights.is_file():
        digest.update(weights.read_bytes())
    return digest.hexdigest()


def learning_rate(settings: FitSettings, progress: float, processes: int = 1) -> float:
    """Linear warm-up from 1e-6, then a cosine to 0.

    Args:
        settings: Peak value, records per update and the warm-up's share of the epochs.
        progress: Share of the training that is done, 0..1: the larger of updates done and time used.
        processes: Each adds its batch.
    """
    peak = settings.learning_rate * math.sqrt(settings.records * processes / REFERENCE_BATCH)
    warmup = min(0.5, settings.warmup_epochs / settings.epochs)
    if progress < warmup:
        return 1e-6 + (peak - 1e-6) * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def teacher_weight(settings: FitSettings, progress: float) -> float:
    """What the distance to the teacher's features counts at a share 0..1 of the training; 0 without a teacher."""
    return settings.teacher_weight if settings.teacher and progress < settings.teacher_until else 0.0
