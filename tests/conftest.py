"""Drawn tissue with known truth, and no network beyond this machine."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from fakes import ByColor
from nuguide import checkpoint, networks
from nuguide.checkpoint import ModelSpec
from nuguide.cli import main
from nuguide.types import Sample

PLAIN = ["--device", "cpu", "--precision", "fp32"]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # real images, where a developer has them


def draw_tissue(
    seed: int = 0, size: tuple[int, int] = (256, 256), nuclei: int = 40, radius: tuple[float, float] = (7.0, 12.0)
) -> tuple[np.ndarray, np.ndarray]:
    """An H&E-like picture and its truth: purple ellipses, apart from each other, on pink stroma.

    Returns image (H, W, 3) uint8 and labels (H, W) int32. Fewer than `nuclei` are drawn where there is no room.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    stroma = cv2.GaussianBlur(rng.normal(0, 1, size), (0, 0), 6)
    image = np.array([228.0, 170.0, 200.0]) + 60 * stroma[..., None] * np.array([0.4, 1.0, 0.6])
    labels = np.zeros(size, np.int32)
    taken = np.zeros(size, np.uint8)
    for _ in range(nuclei * 20):
        if labels.max() == nuclei:
            break
        axes = rng.uniform(*radius, 2)
        center = rng.uniform([0, 0], [width, height])
        turn = float(rng.uniform(0, 180))
        shape = ((float(center[0]), float(center[1])), (float(2 * axes[0]), float(2 * axes[1])), turn)
        one = np.zeros(size, np.uint8)
        cv2.ellipse(one, shape, 1, -1)
        if not one.any() or np.logical_and(cv2.dilate(one, np.ones((5, 5), np.uint8)), taken).any():
            continue
        taken |= one
        labels[one > 0] = labels.max() + 1
        chromatin = cv2.GaussianBlur(rng.normal(0, 1, size), (0, 0), 1.5)[one > 0]
        image[one > 0] = np.array([95.0, 60.0, 140.0]) + rng.normal(0, 10, 3) + 25 * chromatin[:, None]
    image = cv2.GaussianBlur(image, (0, 0), 0.7) + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), labels


def nuguide(*arguments: object) -> int:
    """The exit code of `nuguide ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def segment(inputs: Sequence[Path] | Path, out: Path, model: Path, *more: object) -> int:
    """The exit code of `nuguide segment`, on the CPU in fp32."""
    inputs = [inputs] if isinstance(inputs, Path) else inputs
    return nuguide("segment", *inputs, "--out", out, "--model", model, *PLAIN, *more)


def names(folder: Path) -> list[str]:
    """Of all files in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved model that tells nuclei by color."""
    monkeypatch.setitem(networks.NETWORKS, "by_color", lambda classes: ByColor())
    return checkpoint.save(tmp_path / "model", ByColor(), ModelSpec("by_color"))


@pytest.fixture
def tissue() -> Sample:
    """256 x 256 drawn tissue at 0.5 microns per pixel."""
    image, labels = draw_tissue()
    return Sample(id="drawn", image_rgb=image, labels=labels, mpp=0.5, group="drawn")


@pytest.fixture
def shared_data() -> Path:
    """The folder of real annotated images; the test is skipped where there is none."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real images are not on this machine")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def only_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that reaches for another machine fails instead of hanging or downloading."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise OSError(f"tests stay on this machine; one tried to reach {address[0]}")
        connect(self, address)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(socket.socket, "connect", local_only)
