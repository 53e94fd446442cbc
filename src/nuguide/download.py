"""Files from the net: checked where their hash is known, resumable, and one process at a time."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from .types import UserError

log = logging.getLogger(__name__)

ATTEMPTS = 5
PAUSE_S = 1.0          # before the second attempt; doubles from one to the next
TIMEOUT_S = 30.0       # to connect, and for each read
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Published:
    """Facts about a file that someone publishes.

    Attributes:
        what: it is, in an error: "the weights of sam_vit_b".
        filename: of the published file.
        url: where it can be downloaded without asking.
        license: as its authors state it.
        remedy: what a person can do where the download fails.
        elsewhere: how a person chooses another folder.
        sha256: of the file, in hexadecimal, or None where the authors publish none.
        bytes: its size, or None: then the size that the server states counts.
    """

    what: str
    filename: str
    url: str
    license: str
    remedy: str
    elsewhere: str
    sha256: str | None = None
    bytes: int | None = None


def is_published(path: Path, sha256: str | None, size: int | None) -> bool:
    """Whether the file exists with the published size in bytes and hash, as far as they are known."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return False
    return sha256 is None or file_sha256(path) == sha256


def download(file: Published, target: Path) -> Path:
    """Download `file` to `target`, going on where an earlier download stopped.

    The bytes gather in `target` + ".part", which becomes `target` in one step once its size and SHA-256 are right; of a
    file without a known size or hash, once it is as long as the server says.
    A second process waits for the first. A server that can't be reached is an error at once; a connection that
    breaks is tried again, `ATTEMPTS` in all, and what was received is kept for the next time.

    Raises:
        UserError: no server, a refusal, no stated size, a full disk, or other bytes than the published ones (these are
            deleted).
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(target.name + ".lock").open("a+b")
    except OSError as error:
        raise UserError(f"can't write to {target.parent} ({error}); {file.elsewhere}") from error
    with lock, _only_process(lock):
        if is_published(target, file.sha256, file.bytes):       # another process was quicker
            return target
        log.info("downloading %s (%s) to %s", file.url, file.license, target)
        _gather(file, part)
        if file.sha256 is not None and (got := _sha256(part)) != file.sha256:
            part.unlink()
            raise UserError(
                f"what {file.url} sent is not {file.filename}: sha256 {got} instead of {file.sha256}; "
                f"it was deleted. Try again, or {file.remedy}"
            )
        os.replace(part, target)
    return target


def _gather(file: Published, part: Path) -> None:
    """Fill `part` to the published size, or the size that the server states, over as many connections as it takes."""
    if file.bytes is not None and part.exists() and part.stat().st_size > file.bytes:
        part.unlink()
    reason: object = "no attempt was made"
    for attempt in range(ATTEMPTS):
        have = part.stat().st_size if part.exists() else 0
        if have == file.bytes:
            return
        if attempt:
            log.warning("download of %s broke at byte %d of %s (%s)", file.filename, have, file.bytes, reason)
            time.sleep(PAUSE_S * 2 ** (attempt - 1))
        try:
            file = replace(file, bytes=_receive(file, part, have))
            reason = "the connection was closed early"
        except HTTPError as error:
            error.close()
            reason = f"the server answered {error.code} {error.reason}"
            if error.code == 416:                       # nothing comes after our part: it is all there, or too long
                if file.bytes is None and error.headers.get("Content-Range") == f"bytes */{have}":
                    return
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if attempt == 0 and isinstance(error, URLError):
                break                                   # offline: waiting would only annoy
    if file.bytes is None or not part.exists() or part.stat().st_size != file.bytes:
        raise UserError(f"{file.what} are not here and the download failed ({reason}); {file.remedy}")


def _receive(file: Published, part: Path, have: int) -> int:
    """Append to `part` what one connection yields from byte `have` on; the size of the whole file."""
    headers = {"User-Agent": "nuguide", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(file.url, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        resumed = response.status == 206
        if resumed:
            span, _, stated = response.headers.get("Content-Range", "").partition("/")
            if not span.startswith(f"bytes {have}-"):
                raise HTTPException(f"asked for bytes {have}- and got {span or 'an unnamed range'}")
        else:                                           # a server without ranges sends everything again
            have, stated = 0, response.headers.get("Content-Length", "")
        total = _total(file, stated)
        with (
            _writable(part, "ab" if resumed else "wb", file) as target,
            tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=file.filename, disable=None) as bar,
        ):
            while have <= total and (chunk := response.read(CHUNK_BYTES)):
                have += len(chunk)
                _write(target, chunk[: len(chunk) - max(0, have - total)], part, file)  # never more than was promised
                bar.update(len(chunk))
    return total


def _total(file: Published, stated: str) -> int:
    """The size of the whole file, published or else as the server states it; UserError where these differ."""
    if stated.isdecimal() and file.bytes not in (None, int(stated)):
        raise UserError(f"{file.url} offers {stated} bytes instead of {file.bytes}; {file.remedy}")
    if file.bytes is not None:
        return file.bytes
    if not stated.isdecimal():
        raise UserError(f"{file.url} does not say how long the file is, so a cut one would pass; {file.remedy}")
    return int(stated)


def _writable(part: Path, mode: str, file: Published) -> BinaryIO:
    try:
        return part.open(mode)  # pyright: ignore[reportReturnType]
    except OSError as error:
        raise UserError(f"can't write {part} ({error}); {file.elsewhere}") from error


def _write(target: BinaryIO, chunk: bytes, part: Path, file: Published) -> None:
    try:
        target.write(chunk)
    except OSError as error:
        raise UserError(f"can't write {part} ({error}); free some space or {file.elsewhere}") from error


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal; read once while size and time of change stay as they are."""
    about = path.stat()
    return _content_sha256(path.resolve(), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _content_sha256(path: Path, size: int, mtime_ns: int) -> str:
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
