"""Weights as files: the facts about them, where they lie, and how they get here."""

from __future__ import annotations

import logging
import os
import pickle
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..download import Published, file_sha256, is_published
from ..download import download as fetch
from ..types import UserError

log = logging.getLogger(__name__)

HUB_FILE = "model.safetensors"                          # as a file of weights is called on the Hugging Face hub
WRAPPED_AS = ("state_dict", "model_state", "model")  # where training checkpoints keep the network among other things
DAMAGED = (                                             # what the two readers raise on bytes that are no such file
    SafetensorError, OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, OverflowError, struct.error,
)


@dataclass(frozen=True)
class GuideSpec:
    """Facts about one frozen encoder and its published weights.

    Attributes:
        name: its key in `GUIDES`.
        build: `image_px` (None for a guide that works at any size) -> the network without weights: RGB 0..255
            (B, 3, H, W) -> latent (B, channels, h, w).
        adapt: (network, state) -> the state under the network's own key names and table sizes.
        channels: of the latent.
        stride: input pixels to one cell of the latent, at the size the network sees.
        image_px: sizes of the longest side that the network can be built for, the native one first; empty where it
            works at any size without resizing.
        filename: name of the published file, and of the one in the cache.
        url: where the file can be downloaded without asking, or None.
        sha256: of that file, in hexadecimal, or None where it is not known here: then a file is taken unchecked, with a
            note. bytes: its size, or None.
        license: of the weights, as their authors state it.
        home: page of the authors, for people.
        citation: whom to cite.
        hugging_face: id of the same weights on the Hugging Face hub, whose safetensors file loads too, or None.
        finer: of features finer than the stride that come packed at the end of the latent's channels: (their channels,
            how many times finer), in order.
    """

    name: str
    build: Callable[[int | None], nn.Module]
    adapt: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]
    channels: int
    stride: int
    image_px: tuple[int, ...]
    filename: str
    license: str
    home: str
    citation: str
    url: str | None = None
    sha256: str | None = None
    bytes: int | None = None
    hugging_face: str | None = None
    finer: tuple[tuple[int, int], ...] = ()

    def grid(self, image_px: int | None = None) -> int | None:
        """Rows and columns of a square image's latent, or None where they depend on the image's size."""
        longest = image_px or (self.image_px[0] if self.image_px else None)
        return longest and longest // self.stride


def find_weights(spec: GuideSpec, weights: Path | None = None) -> Path:
    """The weights file of a guide: the given one, else the one in the cache, else a download into the cache.

    A given file is taken as it is, fine-tuned weights too; its hash is logged where it differs from the published one.
    A file in the cache or from the net must have the published size and SHA-256, where they are known.

    Raises:
        UserError: there is no such file, or it can't be downloaded; the message says what to put where.
    """
    if weights is not None:
        if not weights.is_file():
            raise UserError(f"weights file {weights} does not exist or is no file; {remedy(spec)}")
        found = file_sha256(weights)
        if found != spec.sha256:
            whether = "is not the published file" if spec.sha256 else "is taken unchecked, no published sha256 is known"
            log.info("%s: %s %s; its sha256 is %s", spec.name, weights, whether, found)
        return weights
    cached = cache_dir() / spec.filename
    if is_published(cached, spec.sha256, spec.bytes):
        if spec.sha256 is None:
            log.warning("%s: %s is taken unchecked, since no published sha256 is known here", spec.name, cached)
        return cached
    if cached.exists():
        log.warning("%s is not the published file of %s (size or sha256 differ); fetching it again", cached, spec.name)
    if spec.url is None or spec.sha256 is None or spec.bytes is None:
        raise UserError(f"the weights of {spec.name} are not here, and no checked download is known; {remedy(spec)}")
    return download(spec, cached)


def cache_dir() -> Path:
    """Where downloads are kept: `NUGUIDE_CACHE`, else the platform's cache folder."""
    chosen = os.environ.get("NUGUIDE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "nuguide"


def remedy(spec: GuideSpec) -> str:
    """What a person can do to have the weights: the file, its source, size and hash, and where it belongs."""
    size = f"{spec.bytes} bytes ({spec.bytes / 1e6:.0f} MB)" if spec.bytes else "size unknown"
    file = f"{HUB_FILE} of {spec.hugging_face}" if spec.hugging_face and spec.url is None else spec.filename
    digest = f"sha256 {spec.sha256}" if spec.sha256 else "sha256 not known here, so it is taken unchecked"
    return (
        f"get {file} from {spec.url or spec.home} ({size}, {digest}) "
        f"and save it as {cache_dir() / spec.filename}, or name your copy: --guide-weights FILE, in Python weights=FILE"
    )


def download(spec: GuideSpec, target: Path) -> Path:
    """Download the file of `spec` to `target`, as `nuguide.download` does."""
    assert spec.url is not None
    return fetch(
        Published(
            what=f"the weights of {spec.name}", filename=spec.filename, url=spec.url, license=spec.license,
            remedy=remedy(spec), elsewhere="set NUGUIDE_CACHE to a folder on a disk with room that you own",
            sha256=spec.sha256, bytes=spec.bytes,
        ),
        target,
    )  # fmt: skip


def load_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, contiguous, on the CPU.

    `.safetensors` is read as such; anything else as a PyTorch file holding tensors only (no code of a pickle is run).
    A training checkpoint's network is taken out of its "state_dict", "model_state" or "model".

    Raises:
        UserError: the file is damaged, holds no tensors by name, or holds objects that only an unsafe load could make.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols; what matters is whether it loads
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged or holds more than tensors, and nuguide runs no code out of weights files; save its "
            "state dict as .safetensors (safetensors.torch.save_file) and name that file"
        ) from error
    except DAMAGED as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} can't be read as weights ({first_line}); delete it and get it again") from error
    for key in WRAPPED_AS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state dict (tensors by name); save network.state_dict() and name that file")
    return {key: value.contiguous() for key, value in state.items()}
