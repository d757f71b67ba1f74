"""From light to a photograph: the traces that a camera leaves and a generator does not.

A sensor sees one colour per pixel and interpolates the rest, which correlates neighbours with period two (Popescu and
Farid, "Exposing digital forgeries in color filter array interpolated images", IEEE TSP 2005); photons and electronics
add noise that grows with the light (Foi et al., "Practical Poissonian-Gaussian noise modeling", IEEE TIP 2008).
"""

import cv2
import numpy as np

_FULL_WELL = 65535.0


def photograph(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera makes of a scene: lens, sensor, demosaicing, tone curve and sharpening.

    Args:
        scene: Linear light, shape (h, w, 3), float32, 0 to 1.
        rng: Draws the camera and its noise.

    Returns:
        Display values, shape (h, w, 3), float32, 0 to 1.
    """
    light = cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.35, 0.7))
    noise = float(np.exp(rng.uniform(np.log(1e-4), np.log(2e-3))))  # variance at full light, about ISO 100 to 2000
    mosaic = _mosaic(light)
    mosaic = mosaic + np.sqrt(noise * mosaic + (0.2 * noise) ** 1.5) * rng.standard_normal(mosaic.shape, np.float32)
    raw = np.rint(mosaic.clip(0, 1) * _FULL_WELL).astype(np.uint16)
    method = cv2.COLOR_BayerRGGB2RGB if rng.random() < 0.4 else cv2.COLOR_BayerRGGB2RGB_EA
    colour = cv2.demosaicing(raw, method).astype(np.float32) / np.float32(_FULL_WELL)
    if rng.random() < 0.8:  # automatic exposure: the range of the display is used in full
        dark, bright = np.quantile(colour[::4, ::4], (0.01, rng.uniform(0.97, 0.995)))
        colour = (colour - np.float32(dark)) / np.float32(max(0.05, bright - dark))
    picture = tone(colour, rng)
    if rng.random() < 0.6:
        picture = sharpen(picture, rng.uniform(0.7, 1.2), rng.uniform(0.1, 0.6))
    return picture.clip(0, 1)


def _mosaic(light: np.ndarray) -> np.ndarray:
    """One colour per pixel in rows of RG and GB, shape (h, w)."""
    mosaic = light[..., 1].copy()
    mosaic[0::2, 0::2] = light[0::2, 0::2, 0]
    mosaic[1::2, 1::2] = light[1::2, 1::2, 2]
    return mosaic


def tone(light: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Linear light to display values by the sRGB curve (IEC 61966-2-1) and a little contrast, same shape, 0 to 1."""
    light = light.clip(0, 1)
    display = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** np.float32(1 / 2.4) - 0.055)
    contrast = np.float32(rng.uniform(0.0, 0.5))
    return np.asarray((1 - contrast) * display + contrast * display * display * (3 - 2 * display), np.float32)


def sharpen(picture: np.ndarray, sigma: float, amount: float) -> np.ndarray:
    """Unsharp mask, same shape."""
    return np.asarray(picture + np.float32(amount) * (picture - cv2.GaussianBlur(picture, (0, 0), sigma)))
