"""The latent cache: a hit equals a recomputation, keys see all that matters, the folder stays bounded and whole."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nuguide import latents
from nuguide.guides import GUIDES, FrozenGuide
from nuguide.latents import LatentCache, pooled
from nuguide.networks.blocks import MaxBlurPool
from nuguide.types import Sample, UserError


class Counting(nn.Module):
    """One convolution with stride 16, as wide as it is cheap, that counts how often it ran."""

    def __init__(self, channels: int = 8):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, channels, 16, stride=16)
        self.runs = 0

    def forward(self, image: Tensor) -> Tensor:
        self.runs += 1
        return self.convolution(image / 255)


def counting_guide(name: str = "counting", weights_id: str = "a", image_px: int | None = None) -> FrozenGuide:
    return FrozenGuide(Counting(), replace(GUIDES["sam_vit_b"], name=name, channels=8), weights_id, image_px)


def runs(guide: FrozenGuide) -> int:
    assert isinstance(guide.network, Counting)
    return guide.network.runs


def pictures(count: int, size: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


@pytest.fixture
def guide() -> FrozenGuide:
    return counting_guide()


@pytest.fixture
def cache(tmp_path: Path) -> LatentCache:
    return LatentCache(tmp_path / "latents", max_bytes=10_000_000)


def held(cache: LatentCache) -> int:
    return sum(file.stat().st_size for file in cache.root.rglob("*") if file.is_file())


@pytest.mark.parametrize("pool", [None, 4])
def test_a_hit_equals_the_computation(cache: LatentCache, guide: FrozenGuide, tissue: Sample, pool: int | None):
    first = cache.latent(guide, tissue.image_rgb, pool)
    assert first.shape == ((8, 16, 16) if pool is None else (8, 4, 4))
    assert first.dtype == torch.float16
    assert not first.requires_grad
    again = LatentCache(cache.root, cache.max_bytes).latent(guide, tissue.image_rgb, pool)
    assert torch.equal(first, again)
    assert torch.equal(again, latents.compute(guide, tissue.image_rgb, pool))
    assert runs(guide) == 2                                     # the miss, and the line above


def test_the_key_sees_all_that_changes_a_latent(cache: LatentCache, guide: FrozenGuide):
    image = pictures(1)[0]
    changed = image.copy()
    changed[0, 0, 0] ^= 1
    paths = [
        cache.path(guide, image),
        cache.path(guide, image, 2),
        cache.path(guide, changed),
        cache.path(guide, image.reshape(32, 128, 3)),
        cache.path(counting_guide(name="other"), image),
        cache.path(counting_guide(weights_id="b"), image),
        cache.path(counting_guide(image_px=512), image),
        cache.path(counting_guide().to(torch.bfloat16), image),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        paths.append(cache.path(guide, image))
    assert paths[-1] == paths[-2]                               # bfloat16 either way
    assert len(set(paths)) == len(paths) - 1
    assert cache.path(guide, np.asfortranarray(image)) == paths[0]


def test_a_damaged_file_is_computed_again(cache: LatentCache, guide: FrozenGuide, caplog: pytest.LogCaptureFixture):
    image = pictures(1)[0]
    expected = cache.latent(guide, image)
    path = cache.path(guide, image)
    whole = path.read_bytes()
    for damaged in (whole[:-10], b"", b"x" * 100, whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        caplog.clear()
        assert torch.equal(cache.latent(guide, image), expected)
        assert "damaged" in caplog.text
        assert path.read_bytes() == whole
    assert runs(guide) == 5


def test_the_folder_never_outgrows_its_bound(tmp_path: Path, guide: FrozenGuide):
    cache = LatentCache(tmp_path, max_bytes=2000)               # a file here takes about 400
    for image in pictures(30):
        cache.latent(guide, image)
        assert 0 < held(cache) <= 2000


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, guide: FrozenGuide):
    images = pictures(4)
    one = LatentCache(tmp_path / "one", max_bytes=10_000)
    one.latent(guide, images[0])
    cache = LatentCache(tmp_path / "three", max_bytes=int(3.5 * held(one)))
    for age, image in enumerate(images[:3]):
        cache.latent(guide, image)
        os.utime(cache.path(guide, image), (1000 + age, 1000 + age))
    cache.latent(guide, images[0])                              # used again: now the youngest
    cache.latent(guide, images[3])
    kept = [cache.path(guide, image).exists() for image in images]
    assert kept == [True, False, True, True]


def test_a_latent_larger_than_the_cache_is_not_kept(tmp_path: Path, guide: FrozenGuide):
    cache = LatentCache(tmp_path, max_bytes=100)
    assert cache.latent(guide, pictures(1)[0]).shape == (8, 4, 4)
    assert held(cache) == 0


def test_a_failed_write_leaves_nothing_and_the_latent_is_still_right(
    cache: LatentCache, guide: FrozenGuide, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    image = pictures(1)[0]
    monkeypatch.setattr(latents.os, "replace", full)
    with caplog.at_level(logging.WARNING):
        latent = cache.latent(guide, image)
    assert torch.equal(latent, latents.compute(guide, image))
    assert "No space left" in caplog.text
    assert held(cache) == 0


def test_litter_of_a_killed_process_is_swept_when_the_cache_is_full(tmp_path: Path, guide: FrozenGuide):
    cache = LatentCache(tmp_path, max_bytes=1000)
    for name in ("old", "young"):
        (tmp_path / "ab").mkdir(exist_ok=True)
        (tmp_path / "ab" / f"{name}.tmp").write_bytes(b"half")
    os.utime(tmp_path / "ab" / "old.tmp", (1000, 1000))
    for image in pictures(5):
        cache.latent(guide, image)
    assert [file.name for file in tmp_path.rglob("*.tmp")] == ["young.tmp"]


def test_many_threads_share_a_folder(tmp_path: Path, guide: FrozenGuide):
    images = pictures(6)
    expected = [latents.compute(guide, image) for image in images]
    failures: list[object] = []

    def work(seed: int) -> None:
        cache = LatentCache(tmp_path, max_bytes=1500)           # too small for all, so files vanish under their readers
        for index in np.random.default_rng(seed).integers(0, 6, 40):
            if not torch.equal(cache.latent(guide, images[index]), expected[index]):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_square_latent_is_halved_by_max_blur_pooling():
    latent = torch.rand(1, 8, 64, 64)
    halve = MaxBlurPool()
    assert torch.equal(pooled(latent, 16), halve(halve(latent)))
    assert pooled(latent[..., :16, :16], 16).equal(latent[..., :16, :16])


def test_any_other_latent_is_averaged():
    rows = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 8)
    assert pooled(rows, 2)[0, 0].tolist() == [[1.0, 1.0], [4.0, 4.0]]
    assert pooled(torch.full((1, 2, 48, 48), 3.0), 16).eq(3).all()  # 48 = 3 x 16, not a power of two


def test_refusals(tmp_path: Path, cache: LatentCache, guide: FrozenGuide):
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        cache.latent(guide, np.zeros((64, 64, 3), np.float32))
    for parameter in guide.parameters():
        parameter.fill_(1e6)
    with pytest.raises(ValueError, match="beyond the range of float16"):
        cache.latent(guide, pictures(1)[0])
    assert held(cache) == 0
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="choose another folder"):
        LatentCache(tmp_path / "file" / "latents", 1000)
