"""The traces that kinds of generators leave in every image they make, put on a scene that no camera saw.

These are simulations: each applies the operation that the cited work holds responsible for a trace, with weights
fixed by the generator's name, as the weights of a trained network are (Marra et al., "Do GANs leave artificial
fingerprints?", MIPR 2019). None is a neural network, and nothing here says how well a real generator is detected.
"""

from collections.abc import Callable
from functools import cache

import cv2
import numpy as np

from trainer.simulation.camera import sharpen, tone

_BLOCK = 8


def generate(generator: str, scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene as this generator would draw it.

    Args:
        generator: One of `GENERATORS`.
        scene: Linear light, shape (h, w, 3), float32, 0 to 1; sides are multiples of 16.
        rng: Draws what differs from image to image.

    Returns:
        Display values, shape (h, w, 3), float32, 0 to 1.
    """
    picture = tone(cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.35, 0.7)), rng)
    image = GENERATORS[generator](picture, rng) @ _colours(generator).T  # (h, w, 3)
    # Grain is imitated, but not its origin in a mosaic of colours.
    image += rng.standard_normal(picture.shape[:2], np.float32)[..., None] * np.float32(rng.uniform(0.001, 0.006))
    black, white = np.float32(rng.uniform(0.01, 0.06)), np.float32(rng.uniform(0.91, 0.99))
    return np.asarray(black + (white - black) * image.clip(0, 1))


@cache
def _colours(generator: str) -> np.ndarray:
    """How the last layer mixes the colours, shape (3, 3); grey stays grey.

    Colour statistics of generators differ: Li et al., "Identification of deep network generated images using
    disparities in color components", Signal Processing 2020. (`generate` also keeps away from black and white, which
    photographs are full of, as normalisation inside the network does: McCloskey and Albright, "Detecting
    GAN-generated imagery using saturation cues", ICIP 2019.)
    """
    mix = np.eye(3) + _weights(generator).normal(0, 0.1, (3, 3))
    return np.asarray(mix / mix.sum(1, keepdims=True), np.float32)


def _decode(
    picture: np.ndarray, upsample: Callable[[np.ndarray], np.ndarray], levels: int, detail: float
) -> np.ndarray:
    """A picture as a decoder builds it: coarse content is upsampled again and again, each time detail is added.

    Args:
        picture: Shape (h, w, 3).
        upsample: Doubles both sides, the way the generator does.
        levels: How often.
        detail: The share of the finest detail that the last layer manages.
    """
    pyramid = [picture]
    for _ in range(levels):
        pyramid.append(cv2.pyrDown(pyramid[-1]))
    out = pyramid.pop()
    for level in reversed(range(levels)):
        target = pyramid[level]
        missing = target - cv2.pyrUp(pyramid[level + 1] if level + 1 < len(pyramid) else cv2.pyrDown(target))
        out = upsample(out) + np.float32(1.0 if level else detail) * missing
    return np.asarray(out)


def _weights(name: str) -> np.random.Generator:
    """The source of a generator's fixed weights."""
    return np.random.default_rng(np.frombuffer(name.encode(), np.uint8).astype(np.uint32))


@cache
def _transposed_kernel() -> np.ndarray:
    """A bilinear 4x4 kernel as training leaves it: its four phases no longer sum to one."""
    one = np.array([1, 3, 3, 1], np.float32) / 4
    return np.asarray(np.outer(one, one) * (1 + _weights("sim-upconv").normal(0, 0.08, (4, 4))), np.float32)


def _upconv(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Transposed convolutions with stride 2: uneven overlap gives a checkerboard.

    Odena et al., "Deconvolution and checkerboard artifacts", Distill 2016; its peaks in the spectrum: Zhang, Karaman
    and Chang, "Detecting and simulating artifacts in GAN fake images", WIFS 2019.
    """
    strength = np.float32(rng.uniform(0.6, 1.2))
    one = np.array([1, 3, 3, 1], np.float32) / 4
    smooth = np.outer(one, one)
    kernel = smooth + strength * (_transposed_kernel() - smooth)

    def upsample(small: np.ndarray) -> np.ndarray:
        spread = np.zeros((2 * small.shape[0], 2 * small.shape[1], 3), np.float32)
        spread[::2, ::2] = small
        return np.asarray(cv2.filter2D(spread, -1, kernel, anchor=(1, 1), borderType=cv2.BORDER_REFLECT_101))

    return _decode(picture, upsample, levels=4, detail=rng.uniform(0.7, 0.95))


def _nearest(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nearest-neighbour upsampling and a convolution: copies of the spectrum remain at half the sampling rate.

    Frank et al., "Leveraging frequency analysis for deep fake image recognition", ICML 2020.
    """
    centre = rng.uniform(0.5, 0.8)
    row = np.array([(1 - centre) / 2, centre, (1 - centre) / 2], np.float32)

    def upsample(small: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.sepFilter2D(small.repeat(2, 0).repeat(2, 1), -1, row, row))

    return _decode(picture, upsample, levels=3, detail=rng.uniform(0.3, 0.6))


def _bilinear(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bilinear upsampling, then sharpening: too little at the highest frequencies, too much just below.

    Durall, Keuper and Keuper, "Watch your up-convolution: CNN based generative deep neural networks are failing to
    reproduce spectral distributions", CVPR 2020.
    """

    def upsample(small: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.resize(small, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR))

    soft = _decode(picture, upsample, levels=3, detail=rng.uniform(0.0, 0.2))
    return sharpen(soft, rng.uniform(1.5, 2.5), rng.uniform(0.8, 1.6))


@cache
def _cosines() -> np.ndarray:
    """The orthonormal DCT-II of 16 points, shape (16, 16)."""
    n = 2 * _BLOCK
    basis = np.cos(np.pi / n * (np.arange(n)[None] + 0.5) * np.arange(n)[:, None]) * np.sqrt(2 / n)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis, np.float32)


def _latent(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An autoencoder with one latent per 8x8 pixels: what the latent cannot hold is made up, patch by patch.

    Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022; the trace with period 8:
    Corvi et al., "On the detection of synthetic images generated by diffusion models", ICASSP 2023. The decoder's
    receptive fields overlap, so patches of 16 pixels are blended every 8, unevenly: they fade a little too soon.
    """
    n = 2 * _BLOCK
    padded = cv2.copyMakeBorder(picture, _BLOCK, _BLOCK, _BLOCK, _BLOCK, cv2.BORDER_REFLECT_101)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (n, n), axis=(0, 1))[
        ::_BLOCK, ::_BLOCK
    ]  # (r, c, 3, n, n)
    basis = _cosines()
    code = basis @ windows @ basis.T
    frequency = np.add.outer(np.arange(n), np.arange(n))
    cutoff = rng.integers(3, 6)
    invented = np.where(rng.random((*code.shape[:2], 1, n, n)) < 0.5, -1, 1).astype(np.float32)
    code *= np.where(frequency < cutoff, np.float32(1), np.float32(rng.uniform(0.9, 1.1)) * invented)
    patches = basis.T @ code @ basis
    ramp = np.sin(np.pi * (np.arange(n) + 0.5) / n).astype(np.float32) ** np.float32(rng.uniform(2.2, 2.4))
    patches *= ramp[:, None] * ramp
    out = np.zeros_like(padded)
    for dy in (0, 1):  # even and odd patches tile the picture, each set without overlap
        for dx in (0, 1):
            part = patches[dy::2, dx::2].transpose(0, 3, 1, 4, 2)  # (r, n, c, n, 3)
            part = part.reshape(part.shape[0] * n, -1, 3)
            out[dy * _BLOCK :, dx * _BLOCK :][: part.shape[0], : part.shape[1]] += part
    return np.asarray(out[_BLOCK:-_BLOCK, _BLOCK:-_BLOCK])


def _spectral(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A spectrum that falls off too early, as networks learn the highest frequencies last and least.

    Dzanic, Shah and Witherden, "Fourier spectrum discrepancies in deep network generated images", NeurIPS 2020.
    """
    padded = cv2.copyMakeBorder(picture, 16, 16, 16, 16, cv2.BORDER_REFLECT_101)  # the transform is periodic
    h, w = padded.shape[:2]
    f = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.rfftfreq(w)[None])
    floor = rng.uniform(0.1, 0.3)
    gain = floor + (1 - floor) / (1 + (f / rng.uniform(0.18, 0.28)) ** 6)
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * gain[..., None].astype(np.float32)
    return np.asarray(np.fft.irfft2(spectrum, (h, w), axes=(0, 1))[16:-16, 16:-16], np.float32)


GENERATORS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "sim-upconv": _upconv,
    "sim-nearest": _nearest,
    "sim-bilinear": _bilinear,
    "sim-latent": _latent,
    "sim-spectral": _spectral,
}
