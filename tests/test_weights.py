"""Weights files against a server on this machine: whole, cut, wrong, absent, resumed; and files to be refused."""

from __future__ import annotations

import hashlib
import logging
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from nuguide import download
from nuguide.guides import GUIDES, weights
from nuguide.guides.weights import GuideSpec, cache_dir, find_weights, load_state
from nuguide.types import UserError

CONTENT = np.random.default_rng(0).bytes(100_000)


@dataclass
class Server:
    """Serves `content` at every path, and misbehaves as told.

    `cuts` and `statuses` are used up one a request: how many bytes to send before hanging up, and which error to
    answer. `ranges` records what each request asked for.
    """

    url: str = ""
    content: bytes = CONTENT
    knows_ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.ranges.append(asked)
            if state.statuses:
                self.send_error(state.statuses.pop(0))
                return
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and state.knows_ranges else 0
            if start >= len(state.content):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}")
            self.send_header("Content-Length", str(len(state.content) - start))
            self.end_headers()
            end = start + state.cuts.pop(0) if state.cuts else len(state.content)
            self.wfile.write(state.content[start:end])

        def log_message(self, format: str, *args: object) -> None:
            """Silence on the test's output."""

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/toy.pth"
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no waiting between attempts."""
    monkeypatch.setenv("NUGUIDE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def spec(server: Server) -> GuideSpec:
    return replace(
        GUIDES["sam_vit_b"],
        name="toy",
        filename="toy.pth",
        url=server.url,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        bytes=len(CONTENT),
    )


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_a_download_is_the_published_file_and_happens_once(server: Server, spec: GuideSpec, cache: Path):
    assert find_weights(spec) == cache / "toy.pth"
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == [None]
    assert not (cache / "toy.pth.part").exists()


def test_a_cut_connection_is_resumed_where_it_broke(server: Server, spec: GuideSpec, cache: Path):
    server.cuts = [30_000, 20_000]
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=30000-", "bytes=50000-"]


def test_an_interrupted_download_asks_only_for_the_missing_bytes(
    server: Server, spec: GuideSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cuts = [99_000]
    with pytest.raises(UserError, match="closed early"):
        find_weights(spec)
    assert (cache / "toy.pth.part").stat().st_size == 99_000
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=99000-"]


def test_a_complete_part_needs_no_request(server: Server, spec: GuideSpec, cache: Path):
    put(cache, "toy.pth.part", CONTENT)
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == []


def test_an_overlong_part_is_thrown_away(server: Server, spec: GuideSpec, cache: Path):
    put(cache, "toy.pth.part", CONTENT + b"more")
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_server_without_ranges_sends_everything_again(server: Server, spec: GuideSpec, cache: Path):
    server.knows_ranges = False
    put(cache, "toy.pth.part", CONTENT[:40_000])
    assert find_weights(spec).read_bytes() == CONTENT


def test_wrong_content_is_deleted_and_named(server: Server, spec: GuideSpec, cache: Path):
    server.content = CONTENT[:-1] + b"?"
    if server.content == CONTENT:
        server.content = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match="was deleted") as caught:
        find_weights(spec)
    assert hashlib.sha256(server.content).hexdigest() in str(caught.value)
    assert str(spec.sha256) in str(caught.value)
    assert not list(cache.glob("toy.pth"))
    assert not list(cache.glob("*.part"))


def test_a_file_of_another_size_is_refused_before_it_is_fetched(server: Server, spec: GuideSpec, cache: Path):
    server.content = CONTENT[:5000]
    with pytest.raises(UserError, match="offers 5000 bytes instead of 100000"):
        find_weights(spec)
    assert len(server.ranges) == 1


def test_a_server_that_always_hangs_up_is_given_up(server: Server, spec: GuideSpec, cache: Path):
    server.cuts = [10] * 100
    with pytest.raises(UserError, match="closed early"):
        find_weights(spec)
    assert len(server.ranges) == download.ATTEMPTS
    assert (cache / "toy.pth.part").stat().st_size == 10 * download.ATTEMPTS


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(server: Server, spec: GuideSpec, cache: Path):
    server.statuses = [404]
    with pytest.raises(UserError, match="404"):
        find_weights(spec)
    assert len(server.ranges) == 1
    server.statuses = [503, 429]
    assert find_weights(spec).read_bytes() == CONTENT
    assert len(server.ranges) == 4


def test_without_a_server_the_error_says_what_to_put_where(
    spec: GuideSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    offline = replace(spec, url="http://127.0.0.1:9/toy.pth")            # the discard port: nobody listens
    monkeypatch.setattr(download.time, "sleep", lambda seconds: pytest.fail("waited for a server that is not there"))
    with pytest.raises(UserError) as caught:
        find_weights(offline)
    for fact in ("toy", offline.url, "100000 bytes", offline.sha256, str(cache / "toy.pth"), "weights=FILE"):
        assert str(fact) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_without_a_published_hash_are_never_fetched(cache: Path):
    with pytest.raises(UserError) as caught:
        find_weights(GUIDES["medsam"])
    for fact in ("medsam_vit_b.pth", "https://github.com/bowang-lab/MedSAM", str(cache / "medsam_vit_b.pth")):
        assert fact in str(caught.value)
    given, kept = put(cache, "mine.pth", b"x"), put(cache, "medsam_vit_b.pth", b"x")
    assert find_weights(GUIDES["medsam"], given) == given
    assert find_weights(GUIDES["medsam"]) == kept


def test_a_damaged_cached_file_is_fetched_again(server: Server, spec: GuideSpec, cache: Path):
    put(cache, "toy.pth", CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]))
    assert find_weights(spec).read_bytes() == CONTENT
    assert server.ranges == [None]


def test_a_given_file_is_taken_as_it_is_and_its_hash_is_logged(
    server: Server, spec: GuideSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    tuned = put(tmp_path, "tuned.pth", b"tuned")
    with caplog.at_level(logging.INFO):
        assert find_weights(spec, tuned) == tuned
    assert hashlib.sha256(b"tuned").hexdigest() in caplog.text
    assert server.ranges == []
    with pytest.raises(UserError, match=r"nowhere\.pth does not exist"):
        find_weights(spec, tmp_path / "nowhere.pth")


def test_of_two_downloads_at_once_one_waits_for_the_other(server: Server, spec: GuideSpec, cache: Path):
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(find_weights(spec))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "toy.pth"] * 4
    assert server.ranges == [None]


def test_a_full_disk_is_named(server: Server, spec: GuideSpec, cache: Path, monkeypatch: pytest.MonkeyPatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(download, "_writable", lambda part, mode, file: full)
        with pytest.raises(UserError, match="No space left") as caught:
            find_weights(spec)
    assert "NUGUIDE_CACHE" in str(caught.value)


def test_a_cache_that_cannot_be_made_is_named(spec: GuideSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NUGUIDE_CACHE", str(put(tmp_path, "a_file", b"") / "cache"))
    with pytest.raises(UserError, match="a_file"):
        find_weights(spec)


def test_the_cache_lies_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("NUGUIDE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights.sys, "platform", "linux")
    assert cache_dir() == tmp_path / "nuguide"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "nuguide"
    monkeypatch.setattr(weights.sys, "platform", "darwin")
    assert cache_dir() == Path.home() / "Library" / "Caches" / "nuguide"


def test_both_kinds_of_file_give_the_same_tensors(tmp_path: Path):
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2, dtype=torch.float16)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pth")
    torch.save({"epoch": 3, "model": state}, tmp_path / "training.pt")
    for name in ("a.safetensors", "a.pth", "training.pt"):
        loaded = load_state(tmp_path / name)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[key], state[key]) for key in state)


class Intruder:
    """Would leave a file where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_no_code_of_a_pickle_is_run(tmp_path: Path):
    torch.save({"a": torch.zeros(1), "b": Intruder(tmp_path / "mark")}, tmp_path / "trap.pth")
    put(tmp_path, "plain.pkl", pickle.dumps(Intruder(tmp_path / "mark")))
    for name in ("trap.pth", "plain.pkl"):
        with pytest.raises(UserError, match=rf"{name}.*safetensors"):
            load_state(tmp_path / name)
    assert not (tmp_path / "mark").exists()


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "whole.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    safetensors.torch.save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    put(tmp_path, "cut.pth", (tmp_path / "whole.pth").read_bytes()[:2000])
    put(tmp_path, "cut.safetensors", (tmp_path / "whole.safetensors").read_bytes()[:2000])
    put(tmp_path, "empty.pth", b"")
    put(tmp_path, "empty.safetensors", b"")
    put(tmp_path, "page.pth", b"<html>404</html>")
    (tmp_path / "folder.pth").mkdir()
    names = ("list.pth", "numbers.pth", "cut.pth", "cut.safetensors", "empty.pth", "empty.safetensors", "page.pth")
    for name in (*names, "folder.pth", "nowhere.pth"):
        with pytest.raises(UserError, match=name) as caught:
            load_state(tmp_path / name)
        assert "\n" not in str(caught.value)
