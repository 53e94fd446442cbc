"""Weights as files: the facts about them, where they lie, and how they get here (checked, resumable, one at a time)."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import struct
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from ..types import UserError

log = logging.getLogger(__name__)

ATTEMPTS = 5
PAUSE_S = 1.0          # before the second attempt; doubles from one to the next
TIMEOUT_S = 30.0       # to connect, and for each read
CHUNK_BYTES = 1 << 20
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
        sha256: of that file, in hexadecimal, or None where the authors publish none.
        bytes: its size, or None.
        license: of the weights, as their authors state it.
        home: page of the authors, for people.
        citation: whom to cite.
        hugging_face: id of the same weights on the Hugging Face hub, whose safetensors file loads too, or None.
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
        if file_sha256(weights) != spec.sha256:
            log.info("%s: %s is not the published file; its sha256 is %s", spec.name, weights, file_sha256(weights))
        return weights
    cached = cache_dir() / spec.filename
    if is_published(cached, spec):
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
    return (
        f"get {spec.filename} from {spec.url or spec.home} ({size}, sha256 {spec.sha256 or 'not published'}) "
        f"and save it as {cache_dir() / spec.filename}, or name your copy: weights=FILE"
    )


def is_published(path: Path, spec: GuideSpec) -> bool:
    """Whether the file exists with the published size and hash, as far as they are known."""
    if not path.is_file() or (spec.bytes is not None and path.stat().st_size != spec.bytes):
        return False
    return spec.sha256 is None or file_sha256(path) == spec.sha256


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read once while size and time of change stay as they are."""
    about = path.stat()
    return _content_sha256(path.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _content_sha256(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(spec: GuideSpec, target: Path) -> Path:
    """Download the file of `spec` to `target`, going on where an earlier download stopped.

    The bytes gather in `target` + ".part", which becomes `target` in one step once its size and SHA-256 are right.
    A second process waits for the first. A server that can't be reached is an error at once; a connection that
    breaks is tried again, `ATTEMPTS` in all, and what was received is kept for the next time.

    Raises:
        UserError: no server, a refusal, a full disk, or other bytes than the published ones (these are deleted).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock").open("a+b")
    except OSError as error:
        raise UserError(f"can't write to {target.parent} ({error}); set NUGUIDE_CACHE to a folder you own") from error
    with lock, _only_process(lock):
        if is_published(target, spec):                  # another process was quicker
            return target
        log.info("downloading %s (%s) to %s", spec.url, spec.license, target)
        _gather(spec, part)
        got = hashlib.sha256()
        with part.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                got.update(chunk)
        if got.hexdigest() != spec.sha256:
            part.unlink()
            raise UserError(
                f"what {spec.url} sent is not {spec.filename}: sha256 {got.hexdigest()} instead of {spec.sha256}; "
                f"it was deleted. Try again, or {remedy(spec)}"
            )
        os.replace(part, target)
    return target


def _gather(spec: GuideSpec, part: Path) -> None:
    """Fill `part` to the published size, over as many connections as it takes."""
    assert spec.bytes is not None
    if part.exists() and part.stat().st_size > spec.bytes:
        part.unlink()
    reason: object = "no attempt was made"
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have == spec.bytes:
            return
        if attempt:
            log.warning("download of %s broke at byte %d of %d (%s)", spec.filename, have, spec.bytes, reason)
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            _receive(spec, part, have)
            reason = "the connection was closed early"
        except HTTPError as error:
            error.close()
            reason = f"the server answered {error.code} {error.reason}"
            if error.code == 416:                       # the server's file ends before our part does: start over
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if attempt == 0 and isinstance(error, URLError):
                break                                   # offline: waiting would only annoy
    if not part.exists() or part.stat().st_size != spec.bytes:
        raise UserError(f"the weights of {spec.name} are not here and the download failed ({reason}); {remedy(spec)}")


def _receive(spec: GuideSpec, part: Path, have: int) -> None:
    """Append to `part` what one connection yields from byte `have` on."""
    assert spec.url is not None
    assert spec.bytes is not None
    headers = {"User-Agent": "nuguide", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(spec.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        resumed = response.status == 206
        if resumed:
            span, _, total = response.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {have}-"):
                raise HTTPException(f"asked for bytes {have}- and got {span or 'an unnamed range'}")
        else:                                           # a server without ranges sends everything again
            have, total = 0, response.headers.get("Content-Length", "")
        if total.isdecimal() and int(total) != spec.bytes:
            raise UserError(f"{spec.url} offers {total} bytes instead of {spec.bytes}; {remedy(spec)}")
        with (
            _writable(part, "ab" if resumed else "wb") as file,
            tqdm(total=spec.bytes, initial=have, unit="B", unit_scale=True, desc=spec.filename, disable=None) as bar,
        ):
            while have <= spec.bytes and (chunk := response.read(CHUNK_BYTES)):
                have += len(chunk)
                _write(file, chunk[: len(chunk) - max(0, have - spec.bytes)], part)  # never more than was promised
                bar.update(len(chunk))


def _writable(part: Path, mode: str) -> BinaryIO:
    try:
        return part.open(mode)  # pyright: ignore[reportReturnType]
    except OSError as error:
        raise UserError(f"can't write {part} ({error}); set NUGUIDE_CACHE to a folder you own") from error


def _write(file: BinaryIO, chunk: bytes, part: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        raise UserError(
            f"can't write {part} ({error}); free some space or set NUGUIDE_CACHE to a folder on a larger disk"
        ) from error


@contextmanager
def _only_process(lock: BinaryIO) -> Iterator[None]:
    """Holds an open file's lock; the system lets go of it when the process ends, however it ends."""
    if sys.platform == "win32":
        import msvcrt

        while True:
            try:
                msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
                break
            except OSError:                             # LK_LOCK gives up after ten seconds
                time.sleep(1)
        try:
            yield
        finally:
            lock.seek(0)
            msvcrt.locking(lock.fileno(), msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)


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
