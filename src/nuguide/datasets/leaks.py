"""Leaks between the parts of a split: images that are the same, or nearly so, on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np

from nuguide.datasets.dataset import Dataset
from nuguide.datasets.splits import Member, SplitManifest, content_hash
from nuguide.types import UserError

SIDE = 32                   # pixels of the reduced image
KEPT = 16                   # of its frequencies; higher ones change as soon as the image is cropped a little
BITS = 8                    # a side of the hash: 8 x 8 of the lowest frequencies
MOST_DIFFERING = 20         # of 64 bits
LEAST_CORRELATION = 0.72    # of the reduced images
LEAST_TEXTURE = 1.0         # gray levels: spread of a reduced image beyond a slow change of light
PAIRS = 1 << 22             # hashes that are compared at once


@dataclass(frozen=True)
class Leak:
    """Two images of different parts that show the same.

    Attributes:
        part, member: one of them, and the part it is in; other_part, other: the other one.
        differing: bits of 64 in which their hashes differ in the best of eight orientations; None where size and pixels
            are identical.
    """

    part: str
    member: Member
    other_part: str
    other: Member
    differing: int | None

    def __str__(self) -> str:
        how = "is identical to" if self.differing is None else f"({self.differing} of 64 bits differ) is nearly"
        return (
            f"{self.part}: {self.member.dataset}/{self.member.id} {how} "
            f"{self.other_part}: {self.other.dataset}/{self.other.id}"
        )


@dataclass(frozen=True)
class Fingerprint:
    """What is compared of an image.

    Attributes:
        hashes: (8,) uint64, one an orientation, see `orientations`.
        reduced: (32, 32) float32 gray without its slowest and fastest changes, mean 0.
    """

    hashes: np.ndarray
    reduced: np.ndarray

    @property
    def texture(self) -> float:
        """Its spread in gray levels."""
        return float(self.reduced.std())


def find_leaks(manifest: SplitManifest, datasets: Mapping[str, Dataset]) -> list[Leak]:
    """Every pair of images in different parts that are identical, or alike after a change that keeps what they show.

    Found are copies compressed anew, resized, slightly cropped, made brighter or darker, turned by quarter turns and
    mirrored. Not found are crops of one slide that overlap in a part only: that takes a split by slides
    (`splits.shared_groups`). Images with hardly any texture are compared by content alone, since all glass looks alike.

    Args:
        manifest: as `read_manifest` returns it; it names data sets, not their folders.
        datasets: name -> data set, for every name in the manifest.

    Raises UserError where a data set or an image of the manifest is missing, cannot be read, or is not what it was.
    """
    places = {name: {id: index for index, id in enumerate(dataset.ids)} for name, dataset in datasets.items()}
    prints = {
        part: [fingerprint(_image(datasets, places, member)) for member in members]
        for part, members in manifest.parts.items()
    }
    leaks = []
    for part, other_part in combinations(manifest.parts, 2):
        members, others = manifest.parts[part], manifest.parts[other_part]
        pairs: dict[tuple[int, int], int | None] = dict(_alike(prints[part], prints[other_part]))
        by_content: dict[str, list[int]] = {}
        for index, other in enumerate(others):
            by_content.setdefault(other.sha256, []).append(index)
        for index, member in enumerate(members):
            pairs.update(((index, same), None) for same in by_content.get(member.sha256, ()))
        leaks += [Leak(part, members[i], other_part, others[j], pairs[i, j]) for i, j in sorted(pairs)]
    return leaks


def fingerprint(image_rgb: np.ndarray) -> Fingerprint:
    """The fingerprint of an image (H, W, 3) uint8.

    The image is reduced to 32 x 32 gray pixels; a bit of the hash tells whether one of its 8 x 8 lowest frequencies
    (cosine transform, without the mean and the slowest changes, u + v < 3, which a lamp makes) is above their median
    (Zauner, Implementation and benchmarking of perceptual image hash functions, 2010).
    """
    gray = cv2.cvtColor(image_rgb, cv2.COLOR_RGB2GRAY).astype(np.float32)
    frequencies = cv2.dct(cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA))
    frequencies[np.add.outer(np.arange(SIDE), np.arange(SIDE)) < 3] = 0
    frequencies[KEPT:] = frequencies[:, KEPT:] = 0
    hashes = [_hash(turned) for turned in orientations(frequencies)]
    return Fingerprint(np.array(hashes, np.uint64), cv2.idct(frequencies))


def orientations(frequencies: np.ndarray) -> Iterator[np.ndarray]:
    """The cosine transform (n, n) of an image under its 8 quarter turns and mirrorings.

    To mirror an image changes the sign of every second frequency along that axis; to transpose it transposes them.
    """
    signs = np.where(np.arange(len(frequencies)) % 2, -1, 1).astype(np.float32)
    for transposed in (frequencies, frequencies.T):
        for rows in (np.ones_like(signs), signs):
            for columns in (np.ones_like(signs), signs):
                yield transposed * rows[:, None] * columns


def _hash(frequencies: np.ndarray) -> int:
    """64 bits of the lowest frequencies, the first row and column included."""
    lowest = frequencies[:BITS, :BITS].ravel()
    bits = lowest > np.median(lowest[lowest != 0]) if lowest.any() else lowest > 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _image(datasets: Mapping[str, Dataset], places: Mapping[str, Mapping[str, int]], member: Member) -> np.ndarray:
    """An image (H, W, 3) uint8 of a manifest, whose content is compared with what the manifest states."""
    if member.dataset not in datasets:
        raise UserError(f"the manifest names images of {member.dataset}; say where they are: {member.dataset}=FOLDER")
    index = places[member.dataset].get(member.id)
    if index is None:
        raise UserError(f"the manifest names {member.id}, which {member.dataset} lacks; give the folder that holds it")
    image_rgb = datasets[member.dataset][index].image_rgb
    if content_hash(image_rgb) != member.sha256:
        raise UserError(
            f"{member.dataset}, image {member.id} is not the one that the manifest was made of; write the manifest anew"
        )
    return image_rgb


def _alike(ones: list[Fingerprint], others: list[Fingerprint]) -> Iterator[tuple[tuple[int, int], int]]:
    """((index, index of the other), differing bits) of every pair with texture that shows the same."""
    ones_at = [index for index, one in enumerate(ones) if one.texture >= LEAST_TEXTURE]
    others_at = [index for index, one in enumerate(others) if one.texture >= LEAST_TEXTURE]
    if not ones_at or not others_at:
        return
    hashes = np.stack([ones[index].hashes for index in ones_at])                   # (n, 8)
    upright = np.array([others[index].hashes[0] for index in others_at])           # (m,)
    step = max(PAIRS // (8 * len(upright)), 1)
    for first in range(0, len(hashes), step):
        differing = np.bitwise_count(hashes[first : first + step, :, None] ^ upright).min(axis=1)      # (step, m)
        for i, j in np.argwhere(differing <= MOST_DIFFERING).tolist():
            index, other = ones_at[first + i], others_at[j]
            if correlation(ones[index].reduced, others[other].reduced) >= LEAST_CORRELATION:
                yield (index, other), int(differing[i, j])


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The highest correlation of two reduced images (32, 32) over the 8 orientations of one; both have mean 0."""
    length = np.linalg.norm(one) * np.linalg.norm(other)
    if not length:
        return 0.0
    turned = [image for turns in range(4) for image in (np.rot90(one, turns), np.rot90(one, turns).T)]
    return float(max((image * other).sum() for image in turned) / length)
