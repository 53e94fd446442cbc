"""Augmentation drawn on the fly: geometry as one remapping, color as one look-up table plus a stain jitter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .crowd import crowded
from .debris import littered
from .stain import restained


@dataclass(frozen=True)
class Augmentation:
    """How strongly a training patch is varied; every range is drawn from uniformly.

    Attributes:
        rotate: turn by any angle, else by quarter turns only.
        scale: range of enlargement.
        elastic_px: largest shift of the elastic grid.
        gain: range of a factor on the intensity, held back where it would make the brightest pixel too bright; cameras
            expose slides very differently.
        gamma: range of the exponent of the intensity curve.
        brightness: largest shift of the intensity, of 255.
        contrast: range of the slope of the intensity curve.
        clahe: probability of contrast-limited equalization of lightness.
        stain: relative spread of the amount of each stain.
        stain_shift: spread of each stain's base, in optical density.
        blur: of half the patches, the largest standard deviation of a Gaussian blur, in pixels.
        noise: of half the patches, the largest standard deviation of Gaussian noise, of 255.
        jpeg: of half the patches, the least quality at which they are compressed; 100 for none.
        crowd: probability that nuclei are copied up to others, so that they touch or overlap.
        debris: probability that part of the tissue is torn away and stained debris lies on the glass, as background.
    """

    rotate: bool = True
    scale: tuple[float, float] = (0.75, 1.35)
    elastic_px: float = 3.0
    gain: tuple[float, float] = (0.7, 1.5)
    gamma: tuple[float, float] = (0.8, 1.25)
    brightness: float = 12.0
    contrast: tuple[float, float] = (0.85, 1.15)
    clahe: float = 0.1
    stain: float = 0.25
    stain_shift: float = 0.06
    blur: float = 0.0
    noise: float = 0.0
    jpeg: int = 100
    crowd: float = 0.0
    debris: float = 0.0


def augment(
    image_rgb: np.ndarray,
    labels: np.ndarray,
    size: int,
    rng: np.random.Generator,
    how: Augmentation,
    around: int = 0,
    fill: Sequence[float] | None = None,
    margin: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """A random patch, `size` pixels square, of an image (H, W, 3) uint8 and its labels (H, W) int32.

    The patch is centered anywhere inside; beyond the border the image is mirrored, labels with it. The image comes
    with `around` more pixels on every side; where a color to `fill` with is given, they show it instead of the mirrored
    image. They change nothing of the patch itself, but that blur and compression reach into it: with a guide and
    without, a network learns from the same patches. The labels come with `margin` more pixels, in which a nucleus that
    the image's border cuts goes on.
    """
    wide = max(around, margin)
    everywhere = geometry(image_rgb.shape[:2], size, rng, how, wide)
    x, y = (np.ascontiguousarray(place[within(place, wide - around)]) for place in everywhere)
    patch = cv2.remap(image_rgb, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    beyond = np.zeros(x.shape, bool)
    if fill is not None:
        height, width = image_rgb.shape[:2]
        beyond = (x < -0.5) | (x > width - 0.5) | (y < -0.5) | (y > height - 0.5)
        beyond[within(beyond, around)] = False
    x, y = (np.ascontiguousarray(place[within(place, wide - margin)]) for place in everywhere)
    beside = np.ones(x.shape, bool)
    beside[within(beside, margin)] = False
    for place, side in ((x, image_rgb.shape[1]), (y, image_rgb.shape[0])):
        place[beside] = place[beside].clip(0, side - 1)
    # float32 holds label values exactly up to 2^24; remap takes no int32
    found = cv2.remap(labels.astype(np.float32), x, y, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    found = found.astype(np.int32)
    if how.crowd and rng.random() < how.crowd:
        middle, inner = within(patch, around), within(found, margin)
        patch[middle], found[inner] = crowded(patch[middle], found[inner], rng, int(found.max()) + 1)
    if how.debris and rng.random() < how.debris:
        patch, found = littered_patch(patch, found, rng, around, margin)
    patch = degrade(recolor(patch, rng, how, around), rng, how, around)
    if fill is not None:
        patch[beyond] = np.rint(fill)
    return patch, found


def littered_patch(
    image_rgb: np.ndarray, labels: np.ndarray, rng: np.random.Generator, around: int, margin: int
) -> tuple[np.ndarray, np.ndarray]:
    """`littered` for an image that shows `around` pixels beside its patch, and labels that go `margin` beyond it."""
    wide = max(around, margin)
    more = wide - around
    image = cv2.copyMakeBorder(image_rgb, more, more, more, more, cv2.BORDER_REFLECT_101)
    image, found = littered(image, np.pad(labels, wide - margin), rng)
    image, found = image[within(image, more)], found[within(found, wide - margin)]
    return np.ascontiguousarray(image), np.ascontiguousarray(found)


def geometry(
    shape: tuple[int, int], size: int, rng: np.random.Generator, how: Augmentation, around: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of the patch and of what is `around` it comes from: x and y, float32, pixels of the image.

    Both are square, with sides of `size` + 2 `around`.
    """
    height, width = shape
    zoom = 1 / rng.uniform(*how.scale)
    turn = rng.uniform(0, 2 * np.pi) if how.rotate else rng.integers(4) * np.pi / 2
    flip = rng.choice([-1.0, 1.0])
    reach = zoom * size / 2
    center = [rng.uniform(min(reach, side / 2), max(side - reach, side / 2)) - 0.5 for side in (width, height)]
    line = np.arange(-around, size + around, dtype=np.float32) - (size - 1) / 2
    u, v = np.meshgrid(line * flip, line)
    cos, sin = np.cos(turn) * zoom, np.sin(turn) * zoom
    x = (cos * u - sin * v + center[0]).astype(np.float32)
    y = (sin * u + cos * v + center[1]).astype(np.float32)
    if how.elastic_px > 0:
        coarse = rng.uniform(-how.elastic_px, how.elastic_px, (2, 6, 6)).astype(np.float32)
        for place, shift in ((x, coarse[0]), (y, coarse[1])):
            place += np.pad(cv2.resize(shift, (size, size), interpolation=cv2.INTER_CUBIC), around, mode="edge")
    return x, y


def within(image: np.ndarray, around: int) -> tuple[slice, slice]:
    """The patch in an image that shows what is `around` it on every side."""
    return slice(around, image.shape[0] - around), slice(around, image.shape[1] - around)


def recolor(image_rgb: np.ndarray, rng: np.random.Generator, how: Augmentation, around: int = 0) -> np.ndarray:
    """The image under another stain, exposure and contrast; (H, W, 3) uint8 in and out.

    What lies `around` the patch, on every side, goes along with it.
    """
    middle = within(image_rgb, around)
    if how.stain or how.stain_shift:
        image_rgb = jitter_stain(image_rgb, rng, how.stain, how.stain_shift)
    if rng.random() < how.clahe:
        lab = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2LAB)
        whole, patch = lab[..., 0], np.ascontiguousarray(lab[..., 0][middle])
        equalize = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(8, 8)).apply
        lab[..., 0] = equalize(whole)
        lab[..., 0][middle] = equalize(patch)
        image_rgb = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
    gain = min(rng.uniform(*how.gain), 255 / max(int(image_rgb[middle].max()), 1))
    levels = np.arange(256, dtype=np.float32) / 255 * gain
    curve = levels ** rng.uniform(*how.gamma)
    curve = (curve - 0.5) * rng.uniform(*how.contrast) + 0.5
    curve = curve * 255 + rng.uniform(-how.brightness, how.brightness)
    return cv2.LUT(image_rgb, np.clip(np.rint(curve), 0, 255).astype(np.uint8))


def degrade(image_rgb: np.ndarray, rng: np.random.Generator, how: Augmentation, around: int = 0) -> np.ndarray:
    """The image out of focus, noisy and compressed, in the order of a scanner; (H, W, 3) uint8 in and out.

    What lies `around` the patch, on every side, goes along with it.
    """
    blur = rng.uniform(0.1, max(how.blur, 0.1)) if how.blur and rng.random() < 0.5 else 0.0
    noise = rng.uniform(0, how.noise) if how.noise and rng.random() < 0.5 else 0.0
    quality = int(rng.integers(how.jpeg, 100)) if how.jpeg < 100 and rng.random() < 0.5 else 100
    if blur:
        image_rgb = cv2.GaussianBlur(image_rgb, (0, 0), blur)
    if noise:
        middle = within(image_rgb, around)
        patch = rng.standard_normal(image_rgb[middle].shape, np.float32)
        grain = rng.standard_normal(image_rgb.shape, np.float32) if around else patch
        grain[middle] = patch
        image_rgb = np.clip(np.rint(image_rgb + np.float32(noise) * grain), 0, 255).astype(np.uint8)
    if quality < 100:
        coded = cv2.imencode(".jpg", cv2.cvtColor(image_rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        image_bgr = cv2.imdecode(coded, cv2.IMREAD_COLOR)
        assert image_bgr is not None
        image_rgb = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB)
    return image_rgb


def jitter_stain(image_rgb: np.ndarray, rng: np.random.Generator, spread: float, shift: float) -> np.ndarray:
    """The image with each stain's amount scaled by 1 +- `spread` and shifted by +- `shift` (Tellez 2018)."""
    scale = rng.uniform(1 - spread, 1 + spread, 3)
    return restained(image_rgb, scale, rng.uniform(-shift, shift, 3))
