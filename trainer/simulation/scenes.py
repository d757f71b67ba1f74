"""Scenes that have the statistics of natural images: dead leaves with 1/f texture, shading and shadows.

Leaves of a power-law size that hide each other give the edges, scale invariance and long-tailed contrasts of
photographs (Lee, Mumford and Huang, "Occlusion models for natural images", IJCV 2001); their surfaces have the 1/f
spectrum of natural images (Field, JOSA A 1987). Networks learn useful features from such pictures alone (Baradad et
al., "Learning to see by looking at noise", NeurIPS 2021).
"""

from dataclasses import dataclass

import cv2
import numpy as np

# Hue in degrees, saturation and value, each with its spread: foliage, earth, stone, water, autumn, bark.
_MATERIALS = np.array(
    [
        (100, 18, 0.50, 0.15, 0.42, 0.16),
        (32, 8, 0.40, 0.12, 0.50, 0.15),
        (40, 25, 0.10, 0.05, 0.55, 0.18),
        (205, 15, 0.35, 0.12, 0.50, 0.15),
        (28, 14, 0.65, 0.12, 0.62, 0.15),
        (24, 8, 0.35, 0.10, 0.28, 0.10),
    ]
)
# Clear, overcast and evening.
_SKIES = np.array(
    [
        (212, 8, 0.40, 0.12, 0.85, 0.08),
        (215, 20, 0.08, 0.04, 0.85, 0.08),
        (28, 12, 0.35, 0.12, 0.85, 0.10),
    ]
)
_SUPERSAMPLING = 2
_TILE = 256
_DISC, _BLADE, _ROCK, _BOX, _RIDGE = range(5)


@dataclass(frozen=True, slots=True)
class Theme:
    """What the images of one record have in common, as a caption would: colours, kinds of things, light.

    Attributes:
        palette: Colours of things, linear RGB, shape (c, 3).
        sky: Linear RGB above and at the horizon, shape (2, 3).
        kinds: Probabilities of disc, blade, rock and box.
        exponent: Of the power law of sizes; 3 is scale invariant.
        cover: How much area the leaves have in all, in units of the picture's.
        ridges: Hills before the sky.
        light: Direction of the light in radians.
        texture: Contrast of the surfaces.
    """

    palette: np.ndarray
    sky: np.ndarray
    kinds: np.ndarray
    exponent: float
    cover: float
    ridges: int
    light: float
    texture: float


def draw_theme(rng: np.random.Generator) -> Theme:
    """A theme at random."""
    materials = _MATERIALS[rng.choice(len(_MATERIALS), 2, replace=False)]
    flower = (rng.uniform(0, 360), 8, 0.6, 0.15, 0.75, 0.1)
    palette = np.concatenate([_colours(row, 4, rng) for row in (*materials, flower)])
    ridges = int(rng.integers(0, 4))
    cover = float(np.exp(rng.uniform(np.log(0.5), np.log(4.0))))
    return Theme(
        palette=palette[: 9 if rng.random() < 0.5 else 8],
        sky=_colours(_SKIES[rng.integers(len(_SKIES))], 2, rng),
        kinds=rng.dirichlet((0.7, 1.0, 0.8, 0.25)),
        exponent=float(rng.uniform(2.5, 3.1)),
        cover=cover if ridges else 1.5 + cover,  # without a ground the leaves are all there is
        ridges=ridges,
        light=float(rng.uniform(0, 2 * np.pi)),
        texture=float(np.exp(rng.uniform(np.log(0.08), np.log(0.4)))),
    )


def _colours(row: np.ndarray | tuple[float, ...], count: int, rng: np.random.Generator) -> np.ndarray:
    hsv = rng.normal(row[0::2], row[1::2], (count, 3))
    hsv[:, 0] %= 360
    hsv[:, 1:] = hsv[:, 1:].clip(0.02, 0.98)
    rgb = cv2.cvtColor(hsv[:, None].astype(np.float32), cv2.COLOR_HSV2RGB)[:, 0]
    return np.asarray(rgb**2.2)


@dataclass(frozen=True, slots=True)
class _Leaves:
    """What is to be painted, from the back to the front; number 0 is the sky.

    Attributes:
        owner: The number of the one that each pixel shows, shape (h, w).
        kind, radius, angle: Shape (n,).
        centre: Shape (n, 2).
    """

    owner: np.ndarray
    kind: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    centre: np.ndarray


def render(theme: Theme, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """A scene of this theme, shape (height, width, 3), float32, linear light from 0 to 1."""
    w, h = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    leaves = _scatter(theme, w, h, rng)
    light = _shade(theme, leaves, rng)
    light *= 1 + _texture(theme, leaves, rng)
    light *= _shadows(theme, leaves, rng)
    image = np.take(_albedo(theme, leaves, rng), leaves.owner, axis=0) * np.maximum(light, 0.02)[..., None]  # (h, w, 3)
    mix = np.linspace(0, 1, h, dtype=np.float32)[:, None]
    sky = (theme.sky[0] * (1 - mix) + theme.sky[1] * mix).astype(np.float32)[:, None]
    image = np.where((leaves.owner == 0)[..., None], sky * np.maximum(light, 0.02)[..., None], image)
    image = cv2.resize(_defocus(image, leaves, rng), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(np.clip(image * np.float32(rng.uniform(0.7, 1.4)), 0, 1))


def _scatter(theme: Theme, w: int, h: int, rng: np.random.Generator) -> _Leaves:
    side = float(np.sqrt(w * h))
    low, high = 0.02 * side, 0.35 * side
    power = 1 - theme.exponent
    radius = (low**power + rng.random(500) * (high**power - low**power)) ** (1 / power)
    radius = radius[np.cumsum(np.pi * radius**2) < theme.cover * w * h]
    n = len(radius)
    centre = rng.uniform(-0.1, 1.1, (n, 2)) * (w, h)
    if theme.ridges:  # a landscape: things stand on the ground, larger where it is nearer
        depth = np.sort(rng.beta(1.3, 1.0, n))
        centre[:, 1] = (0.35 + 0.75 * depth) * h
        radius *= 0.35 + 0.9 * depth
    kind = rng.choice(len(theme.kinds), n, p=theme.kinds)
    angle = rng.uniform(0, 2 * np.pi, n)
    ridges = [_ridge(0.25 + 0.15 * i + rng.uniform(-0.08, 0.08), w, h, rng) for i in range(theme.ridges)]
    outlines = [*ridges, *(_outlines(kind, radius, angle, rng) + centre[:, None])]
    owner = np.zeros((h, w), np.int32)
    for number, outline in enumerate(outlines, start=1):
        cv2.fillPoly(owner, [np.rint(outline * 16).astype(np.int32)], number, lineType=cv2.LINE_8, shift=4)
    before = 1 + len(ridges)
    return _Leaves(
        owner=owner.astype(np.intp),
        kind=np.concatenate([np.full(before, _RIDGE), kind]),
        radius=np.concatenate([np.full(before, side), radius]).astype(np.float32),
        angle=np.concatenate([np.zeros(before), angle]).astype(np.float32),
        centre=np.concatenate([np.full((before, 2), (w / 2, h / 2)), centre]).astype(np.float32),
    )


def _ridge(level: float, w: int, h: int, rng: np.random.Generator) -> np.ndarray:
    """The outline of a hill across the picture, shape (m, 2): its crest is a 1/f curve."""
    f = np.fft.rfftfreq(128)
    f[0] = 1
    crest = np.fft.irfft(np.fft.rfft(rng.standard_normal(128)) / f**1.4)[:64]
    crest = level * h + rng.uniform(0.03, 0.1) * h * (crest - crest.mean()) / crest.std()
    points = np.stack([np.linspace(-0.02, 1.02, 64) * w, crest], 1)
    return np.concatenate([points, [(1.02 * w, 1.1 * h), (-0.02 * w, 1.1 * h)]])


def _outlines(kind: np.ndarray, radius: np.ndarray, angle: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Closed outlines around the origin, shape (n, m, 2)."""
    n, m = len(kind), 28
    t = np.linspace(0, 2 * np.pi, m, endpoint=False)
    along, around = np.cos(t), np.sin(t)
    flat = rng.uniform(0.6, 1, (n, 1))
    bend = rng.uniform(-0.3, 0.3, (n, 1))
    wide = rng.uniform(0.15, 0.45, (n, 1))
    rough = np.fft.irfft(rng.normal(0, 1, (n, 6)) * (0, 0, 1, 0.7, 0.5, 0.4), m) * 2.2 + 1
    square = np.maximum(np.abs(along), np.abs(around))
    shapes = {
        _DISC: (along * np.ones_like(flat), around * flat),
        _BLADE: (1.6 * along * np.ones_like(flat), 1.6 * (np.sign(around) * wide * (1 - along**2) + bend * along**2)),
        _ROCK: (along * rough, around * rough * flat),
        _BOX: (0.85 * along / square * np.ones_like(flat), 0.85 * around / square * (2 * flat - 0.9)),
    }
    x, y = (np.choose(kind[:, None], [shape[axis] for shape in shapes.values()]) for axis in (0, 1))
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.asarray(np.stack([x * cos - y * sin, x * sin + y * cos], -1) * radius[:, None, None])  # (n, m, 2)


def _albedo(theme: Theme, leaves: _Leaves, rng: np.random.Generator) -> np.ndarray:
    """Linear RGB of each leaf, shape (n, 3): neighbours in depth are often alike, far ridges fade into the sky."""
    n = len(leaves.kind)
    steps = np.cumsum(rng.random(n) < 0.3)
    colours = theme.palette[rng.integers(0, len(theme.palette), n)[steps]]
    colours = colours * np.exp(rng.normal(0, 0.22, (n, 1)) + rng.normal(0, 0.05, (n, 3)))
    haze = np.zeros((n, 1))
    haze[1 : theme.ridges + 1, 0] = np.linspace(0.6, 0.1, theme.ridges) if theme.ridges else ()
    return np.asarray(colours * (1 - haze) + theme.sky[1] * haze, np.float32)


def _shade(theme: Theme, leaves: _Leaves, rng: np.random.Generator) -> np.ndarray:
    """Brightness by the surface's slope, shape (h, w): discs and rocks are domes, blades folded, the rest is flat."""
    n, (h, w) = len(leaves.kind), leaves.owner.shape
    dome = np.isin(leaves.kind, (_DISC, _ROCK)) * rng.uniform(0.2, 1.0, n)
    fold = (leaves.kind == _BLADE) * rng.uniform(0.0, 0.35, n)
    slope = rng.normal(0, 0.25, (n, 2)) + 0.3 * np.array([np.cos(theme.light), np.sin(theme.light)])
    columns = (leaves.centre, 1 / leaves.radius[:, None], slope, dome[:, None], fold[:, None])
    across = np.stack([-np.sin(leaves.angle), np.cos(leaves.angle)], 1)
    table = np.concatenate([*columns, across], 1).astype(np.float32)  # (n, 9)
    cx, cy, scale, sx, sy, dome_, fold_, ax, ay = np.take(table.T, leaves.owner, axis=1)  # each (h, w)
    dx = (np.arange(w, dtype=np.float32)[None] - cx) * scale
    dy = (np.arange(h, dtype=np.float32)[:, None] - cy) * scale
    shade = 1 + dx * sx + dy * sy + fold_ * np.tanh(6 * (dx * ax + dy * ay))
    up = np.sqrt(np.clip(1.1 - dx * dx - dy * dy, 0.0, 1.0))
    toward = dx * np.float32(np.cos(theme.light)) + dy * np.float32(np.sin(theme.light))
    return np.asarray(shade * (1 - dome_ + dome_ * np.clip(0.35 + 0.75 * up + 0.5 * toward, 0.15, 2.0)))


def _texture(theme: Theme, leaves: _Leaves, rng: np.random.Generator) -> np.ndarray:
    """A relative change of brightness, shape (h, w): each leaf shows its own place of one of three 1/f fields."""
    n, (h, w) = len(leaves.kind), leaves.owner.shape
    f = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None])
    f[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((_TILE, _TILE), dtype=np.float32))
    fields = [np.fft.irfft2(spectrum / f**exponent).astype(np.float32) for exponent in (0.8, 1.1, 1.5)]
    stack = np.concatenate([(field / field.std()).ravel() for field in fields])
    amplitude = (theme.texture * rng.gamma(2.0, 0.5, n)).astype(np.float32)
    place = np.stack([rng.integers(0, 3, n) * _TILE * _TILE, *rng.integers(0, _TILE, (2, n))], 1).astype(np.int32)
    place[0, 0], amplitude[0] = 2 * _TILE * _TILE, 0.5 * theme.texture  # the sky has soft clouds
    field, row, column = np.take(place.T, leaves.owner, axis=1)  # each (h, w)
    rows = (np.arange(h, dtype=np.int32)[:, None] + row) % _TILE
    columns = (np.arange(w, dtype=np.int32)[None] + column) % _TILE
    return np.asarray(np.take(stack, field + rows * _TILE + columns) * np.take(amplitude, leaves.owner))


def _shadows(theme: Theme, leaves: _Leaves, rng: np.random.Generator) -> np.ndarray:
    """How much light reaches each pixel, shape (h, w): higher leaves cast soft shadows and darken the gaps."""
    h, w = leaves.owner.shape
    height = leaves.owner.astype(np.float32)
    reach = rng.uniform(0.01, 0.04) * w
    shift = np.array([[1, 0, -reach * np.cos(theme.light)], [0, 1, -reach * np.sin(theme.light)]], np.float32)
    caster = cv2.warpAffine(height, shift, (w, h), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REPLICATE)
    shaded = (caster > height) & (height > 0)
    soft = cv2.GaussianBlur(shaded.astype(np.float32), (0, 0), 0.3 * reach + 1)
    around = cv2.blur(height, (int(0.06 * w) | 1,) * 2)
    gaps = np.clip((around - height) / max(1.0, float(height.max())), 0, 1)
    gaps[height == 0] = 0
    return np.asarray((1 - np.float32(rng.uniform(0.2, 0.6)) * soft) * np.exp(-1.5 * gaps))


def _defocus(image: np.ndarray, leaves: _Leaves, rng: np.random.Generator) -> np.ndarray:
    """Blurs what lies behind, in a third of the pictures."""
    n = len(leaves.kind)
    if rng.random() < 2 / 3 or n < 4:
        return image
    behind = (leaves.owner < int(rng.uniform(0.2, 0.7) * n)).astype(np.float32)
    far = np.asarray(cv2.GaussianBlur(behind, (0, 0), 1.0))[..., None]
    return np.asarray(image * (1 - far) + cv2.GaussianBlur(image, (0, 0), rng.uniform(1.5, 4.0)) * far)
