"""Data sets against a server on this machine: whole, cut, wrong, resumed, absent; and archives to be refused."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import struct
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nuguide import download
from nuguide.datasets import DATASETS, fetch, read_dataset
from nuguide.datasets.facts import FACTS, PUBLISHED
from nuguide.datasets.fetch import NOTE, archive_path, unpack
from nuguide.types import UserError


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip archive."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return held.getvalue()


def picture(value: int, mode: str) -> bytes:
    """An 8 x 8 PNG of noise."""
    held = io.BytesIO()
    noise = np.random.default_rng(value).integers(0, 255, (8, 8, 4), np.uint8)
    pixels = noise if mode == "RGBA" else np.uint8(255) * (noise[..., 0] > 200)
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


TNBC = zipped({
    "TNBC_NucleiSegmentation/Slide_01/01_1.png": picture(1, "RGBA"),
    "TNBC_NucleiSegmentation/GT_01/01_1.png": picture(1, "L"),
    "TNBC_NucleiSegmentation/.DS_Store": b"clutter",
    "__MACOSX/TNBC_NucleiSegmentation/._Slide_01": b"clutter",
})  # fmt: skip


@dataclass
class Server:
    """Serves `content` at every path, hangs up after each of `cuts` bytes, one a request; `says` its length or not."""

    url: str = ""
    content: bytes = TNBC
    cuts: list[int] = field(default_factory=list)
    says: bool = True
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.ranges.append(asked)
            start, total = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0, len(state.content)
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            if state.says:
                self.send_header("Content-Length", str(total - start))
            self.end_headers()
            self.wfile.write(state.content[start : start + state.cuts.pop(0) if state.cuts else total])

        def log_message(self, format: str, *args: object) -> None:
            """Silence on the test's output."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/archive.zip"
        for name in ("tnbc", "dsb2018"):
            monkeypatch.setitem(FACTS, name, replace(FACTS[name], url=state.url))
        yield state
        http.shutdown()
        thread.join()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_set_arrives_as_its_reader_takes_it(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "tnbc"
    assert fetch.fetch("tnbc", root) == root
    assert names(root) == ["GT_01/01_1.png", NOTE, "Slide_01/01_1.png"]
    assert read_dataset("tnbc", root)[0].image_rgb.shape == (8, 8, 3)
    facts = json.loads((root / NOTE).read_text())
    assert facts["archive_sha256"] == hashlib.sha256(TNBC).hexdigest()
    assert facts["license"] == "CC BY 4.0"
    assert [path.name for path in tmp_path.iterdir()] == ["tnbc"]          # neither archive nor lock nor half a folder
    assert fetch.fetch("tnbc", root) == root
    assert server.ranges == [None]                                         # the second time nothing was asked for


def test_content_without_a_folder_of_its_own_goes_where_it_belongs(server: Server, tmp_path: Path) -> None:
    server.content = zipped({f"{id}/images/{id}.png": picture(1, "RGBA") for id in ("ab", "cd")})
    root = fetch.fetch("dsb2018", tmp_path / "new" / "dsb")
    assert names(root) == [NOTE, "stage1_train/ab/images/ab.png", "stage1_train/cd/images/cd.png"]


def test_an_empty_folder_is_filled_and_a_full_one_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "Slide_01/01_1.png" in names(fetch.fetch("tnbc", tmp_path / "empty"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(UserError, match=r"mine holds something else already"):
        fetch.fetch("tnbc", tmp_path / "mine")


def test_a_download_that_broke_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    server.cuts = [100, 50]
    assert names(fetch.fetch("tnbc", tmp_path / "tnbc"))
    assert server.ranges == [None, "bytes=100-", "bytes=150-"]


def test_an_interrupted_command_goes_on_the_next_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.cuts = [100]
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    with pytest.raises(UserError, match="the images of tnbc .* closed early"):
        fetch.fetch("tnbc", tmp_path / "tnbc")
    assert not (tmp_path / "tnbc").exists()
    assert names(fetch.fetch("tnbc", tmp_path / "tnbc"))
    assert server.ranges == [None, "bytes=100-"]


def test_a_part_that_is_the_whole_file_is_known_as_such(server: Server, tmp_path: Path) -> None:
    archive = archive_path("tnbc", tmp_path / "tnbc")
    archive.with_name(archive.name + ".part").write_bytes(TNBC)
    assert names(fetch.fetch("tnbc", tmp_path / "tnbc"))
    assert server.ranges == [f"bytes={len(TNBC)}-"]


def test_a_part_of_another_file_is_thrown_away(server: Server, tmp_path: Path) -> None:
    archive = archive_path("tnbc", tmp_path / "tnbc")
    archive.with_name(archive.name + ".part").write_bytes(TNBC + b"more")
    assert names(fetch.fetch("tnbc", tmp_path / "tnbc"))
    assert server.ranges == [f"bytes={len(TNBC) + 4}-", None]


def test_a_server_that_says_no_length_is_not_trusted(server: Server, tmp_path: Path) -> None:
    server.says = False
    with pytest.raises(UserError, match=r"does not say how long .* save it as .*tnbc\.tnbc\.zip"):
        fetch.fetch("tnbc", tmp_path / "tnbc")


def test_an_archive_that_someone_brought_is_taken(server: Server, tmp_path: Path) -> None:
    archive_path("tnbc", tmp_path / "tnbc").write_bytes(TNBC)
    assert names(fetch.fetch("tnbc", tmp_path / "tnbc"))
    assert server.ranges == []


@pytest.mark.parametrize("brought", [True, False])
def test_a_wrong_hash_is_refused_where_it_is_known(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, brought: bool
) -> None:
    monkeypatch.setitem(FACTS, "tnbc", replace(FACTS["tnbc"], sha256="0" * 64, bytes=len(TNBC)))
    if brought:
        archive_path("tnbc", tmp_path / "tnbc").write_bytes(TNBC)
    with pytest.raises(UserError, match="sha256"):
        fetch.fetch("tnbc", tmp_path / "tnbc")
    assert not (tmp_path / "tnbc").exists()


def test_a_cut_archive_leaves_no_folder(server: Server, tmp_path: Path) -> None:
    server.content = TNBC[:-40]
    with pytest.raises(UserError, match=r"tnbc\.tnbc\.zip is damaged or no zip archive"):
        fetch.fetch("tnbc", tmp_path / "tnbc")
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_without_a_server_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(FACTS, "tnbc", replace(FACTS["tnbc"], url="http://127.0.0.1:9/archive.zip"))
    monkeypatch.setattr(download.time, "sleep", lambda seconds: pytest.fail("waited for a server that is not there"))
    with pytest.raises(UserError) as caught:
        fetch.fetch("tnbc", tmp_path / "tnbc")
    for fact in ("the images of tnbc", "https://zenodo.org/records/1175282", str(tmp_path / "tnbc.tnbc.zip")):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if FACTS[name].url is None])
def test_a_set_behind_a_login_has_a_page_and_steps(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fetch.fetch(name, tmp_path / "there")
    for fact in (name, FACTS[name].page, FACTS[name].license or "?", str(tmp_path / "there")):
        assert fact in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "ROOT" not in str(caught.value)


def test_every_source_has_a_reader_and_its_facts() -> None:
    assert set(PUBLISHED) == set(DATASETS) - {"folder", "qupath"}
    for source in (FACTS[name] for name in PUBLISHED):
        assert source.license
        assert source.citation
        assert (source.url is None) == bool(source.steps)
        assert source.page.startswith("https://")
        assert source.url is None or source.url.startswith("https://")
    with pytest.raises(ValueError, match="choose from nuinsseg, tnbc"):
        fetch.fetch("imagenet", Path("there"))


def put(tmp_path: Path, content: bytes) -> Path:
    (tmp_path / "archive.zip").write_bytes(content)
    return tmp_path / "archive.zip"


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/outside", "C:/outside", "a\\..\\outside", "..", "//host/outside"]
)
def test_an_entry_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = put(tmp_path, zipped({"fine.txt": b"1", name: b"2"}))
    with pytest.raises(UserError, match=r"archive\.zip is not unpacked: its entry .* lies outside"):
        unpack(archive, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["archive.zip"]


def test_links_encrypted_entries_and_doubles_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="'link' is a link"):
        unpack(tmp_path / "archive.zip", tmp_path / "out")
    locked = bytearray(zipped({"locked": b"1"}))
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(UserError, match="'locked' is encrypted"):
        unpack(put(tmp_path, bytes(locked)), tmp_path / "out")
    twice = zipped({"twice": b"1", "again": b"2"}).replace(b"again", b"twice")
    with pytest.raises(UserError, match="'twice' is there twice"):
        unpack(put(tmp_path, twice), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bombs_are_refused_before_they_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MOST_BYTES", 10**6)
    monkeypatch.setattr(fetch, "MOST_FILES", 3)
    with pytest.raises(UserError, match="would unpack to 2000000 bytes, more than 1000000"):
        unpack(put(tmp_path, zipped({"zeros": bytes(2 * 10**6)})), tmp_path / "out")
    with pytest.raises(UserError, match="holds 4 files, more than 3"):
        unpack(put(tmp_path, zipped({str(name): b"" for name in range(4)})), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bomb_that_declares_less_than_it_holds_does_not_grow_beyond_that(tmp_path: Path) -> None:
    lying = bytearray(zipped({"zeros": bytes(10**6)}))
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):       # the size that either header declares
        struct.pack_into("<I", lying, lying.index(header) + offset, 1000)
    with pytest.raises(UserError, match="damaged"):
        unpack(put(tmp_path, bytes(lying)), tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) <= 1000


@pytest.mark.parametrize("content", [b"", b"<html>login</html>", zipped({})])
def test_what_is_no_archive_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"archive\.zip (is damaged|holds no file)"):
        unpack(put(tmp_path, content), tmp_path / "out")


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    content = bytearray(zipped({"noise": np.random.default_rng(0).bytes(5000)}))
    content[2000] ^= 1
    with pytest.raises(UserError, match="damaged"):
        unpack(put(tmp_path, bytes(content)), tmp_path / "out")
