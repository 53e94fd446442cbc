"""What flows between the parts: a `Sample` goes in, tiles cover it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -1                # label and target of a pixel of which nothing is taught


class UserError(Exception):
    """Something the user can put right: the message names the file or the option, and the remedy.

    The command line prints the message as one line and exits with 2 (1 where the rest of a batch was done).
    """


@dataclass(frozen=True)
class Sample:
    """One annotated image.

    Attributes:
        id: unique within its data set.
        image_rgb: (H, W, 3) uint8.
        labels: (H, W) int32 instance label map; 0 is background, every other value one nucleus.
        mpp: microns per pixel of `image_rgb`.
        group: what must not be divided by a split: the patient, slide or organ.
        ignore: (H, W) bool, True where nothing is scored (areas the annotators called vague), or None.
        instances_are_exact: False where touching nuclei were divided by a computation instead of by a person.
    """

    id: str
    image_rgb: np.ndarray
    labels: np.ndarray
    mpp: float
    group: str
    ignore: np.ndarray | None = None
    instances_are_exact: bool = True


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image that is computed at once, and the part of it that it owns.

    The cores of a cover divide the image: every pixel lies in exactly one. All numbers are pixels of the covered
    image; `top <= core_top < core_bottom <= bottom`, and likewise from left to right.
    """

    top: int
    left: int
    bottom: int
    right: int
    core_top: int
    core_left: int
    core_bottom: int
    core_right: int

    @property
    def window(self) -> tuple[slice, slice]:
        """The whole rectangle, as an index into (H, W, ...)."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    def owns(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Whether points (in pixels of the covered image) lie in the core."""
        return (y >= self.core_top) & (y < self.core_bottom) & (x >= self.core_left) & (x < self.core_right)
