"""Getting data sets: a download where one is open to all, the page and the steps where it is not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from nuguide.datasets.facts import FACTS, PUBLISHED, Facts
from nuguide.download import Published, download, file_sha256
from nuguide.types import UserError

NOTE = "SOURCE.json"
MOST_FILES = 200_000        # that an archive may hold; the largest set here has about 30,000
MOST_BYTES = 50 * 10**9     # that they may have together, unpacked
CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


def fetch(name: str, root: Path) -> Path:
    """A data set of `PUBLISHED` in the folder `root`, as its reader takes it; downloaded where it is not there.

    The archive gathers beside `root` and is deleted once it is unpacked; a download that was cut goes on where it
    stopped. The folder appears in one step, with a `SOURCE.json` that says where it comes from, with the SHA-256 of the
    archive. An archive that someone else downloaded can be laid where `archive_path` says.

    Raises:
        ValueError: an unknown name.
        UserError: no open download (the message has the page and the steps), no server, a damaged or refused archive,
            a folder that holds something else, a full disk.
    """
    if name not in PUBLISHED:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(PUBLISHED)}")
    source = FACTS[name]
    if source.url is None:
        raise UserError(how_to_get(name, root))
    if (root / NOTE).is_file():
        log.info("%s is there already", root)
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} holds something else already; name a folder that is empty or not there yet")
    archive = archive_path(name, root)
    if not archive.is_file():
        download(_published(name, source, archive), archive)
    elif source.sha256 not in (None, file_sha256(archive)):
        raise UserError(f"{archive} is not the archive that {source.page} publishes (sha256 differs); delete it")
    _unpack_to_root(archive, root, source)
    archive.unlink()
    archive.with_name(archive.name + ".lock").unlink(missing_ok=True)
    return root


def how_to_get(name: str, root: Path) -> str:
    """One line that says what a person has to do to have a data set without an open download."""
    source = FACTS[name]
    steps = source.steps.replace("ROOT", str(root))
    return f"{name} ({source.license}) has no open download; see {source.page}: {steps}. Cite {source.citation}"


def archive_path(name: str, root: Path) -> Path:
    """Where the archive of a data set is looked for and downloaded to: beside its folder."""
    return root.with_name(f"{root.name}.{name}.zip")


def _published(name: str, source: Facts, archive: Path) -> Published:
    assert source.url is not None
    assert source.license is not None
    return Published(
        what=f"the images of {name}",
        filename=archive.name,
        url=source.url,
        license=source.license,
        remedy=f"try again, or download it from {source.page} with a browser and save it as {archive}",
        elsewhere="name a folder on a disk with room that you own",
        sha256=source.sha256,
        bytes=source.bytes,
    )


def _unpack_to_root(archive: Path, root: Path, source: Facts) -> None:
    """Unpack beside `root` and move the result there; nothing is left behind where that fails."""
    try:
        made = Path(tempfile.mkdtemp(dir=root.parent, prefix=f".{root.name}."))
    except OSError as error:
        raise UserError(f"{root.parent}: cannot be written ({error.strerror}); name another folder") from error
    try:
        unpack(archive, made / "all")
        content = made / "root" / source.into
        content.parent.mkdir(parents=True, exist_ok=True)
        os.replace(_inner(made / "all"), content)
        facts = {"page": source.page, "url": source.url, "license": source.license, "citation": source.citation,
                 "archive_sha256": file_sha256(archive), "archive_bytes": archive.stat().st_size}  # fmt: skip
        (made / "root" / NOTE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (made / "root").chmod(0o755)
        if root.is_dir():
            root.rmdir()
        os.replace(made / "root", root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error.strerror or error}); free some space") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _inner(folder: Path) -> Path:
    """The one folder that everything lies in, where an archive has such, else the folder itself."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into a new folder, every checksum in it compared.

    Raises UserError, before anything is written, for an archive that would write outside the folder, holds links,
    encrypted or twice named entries, or declares more than `MOST_FILES` files or `MOST_BYTES` bytes; and for one that
    is damaged or holds more than it declares. What OSError a full disk raises is the caller's.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not _is_clutter(entry.filename)]
            _admit(archive, entries)
            folder.mkdir(parents=True)
            for entry in entries:
                target = folder.joinpath(*_parts(entry.filename))
                if entry.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(opened, entry, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UserError(f"{archive} is damaged or no zip archive ({error}); delete it and try again") from error


def _write(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    """One file of an archive, in chunks, and never more than it declares."""
    left = entry.file_size
    with opened.open(entry) as source, target.open("xb") as file:
        while chunk := source.read(CHUNK_BYTES):
            left -= len(chunk)
            if left < 0:
                raise zipfile.BadZipFile(f"{entry.filename} is longer than declared")
            file.write(chunk)
    if left:
        raise zipfile.BadZipFile(f"{entry.filename} is shorter than declared")


def _admit(archive: Path, entries: list[zipfile.ZipInfo]) -> None:
    """UserError unless every entry can be unpacked without harm."""
    if not entries:
        raise UserError(f"{archive} holds no file; delete it and try again")
    if len(entries) > MOST_FILES:
        raise UserError(f"{archive} holds {len(entries)} files, more than {MOST_FILES}; it is not unpacked, delete it")
    declared = sum(entry.file_size for entry in entries)
    if declared > MOST_BYTES:
        raise UserError(f"{archive} would unpack to {declared} bytes, more than {MOST_BYTES}; delete it")
    names: set[tuple[str, ...]] = set()
    for entry in entries:
        parts = _parts(entry.filename)
        if problem := _problem(entry, parts, names):
            raise UserError(f"{archive} is not unpacked: its entry {entry.filename!r} {problem}; delete it")
        names.add(parts)


def _problem(entry: zipfile.ZipInfo, parts: tuple[str, ...], names: set[tuple[str, ...]]) -> str | None:
    """Why an entry is refused, in words, or None."""
    name = entry.filename
    if name.startswith(("/", "\\")) or ".." in parts or ":" in name or "\\" in name or not parts:
        return "lies outside the folder"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if entry.flag_bits & 1:
        return "is encrypted"
    return "is there twice" if parts in names else None


def _parts(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts


def _is_clutter(name: str) -> bool:
    """Whether an entry is what macOS adds for itself."""
    return name.startswith("__MACOSX/") or PurePosixPath(name).name == ".DS_Store"
