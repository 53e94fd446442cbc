"""Patches drawn from a seed and a number alone, balanced over groups, with the latent that belongs to them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nuguide.augment import Augmentation
from nuguide.batches import (
    Patches,
    Picture,
    collate,
    drawing_weights,
    harder,
    lattice_patch,
    picture,
    resized,
    turned,
)
from nuguide.guides import GUIDES, FrozenGuide
from nuguide.instances import gaps, targets
from nuguide.latents import LatentCache
from nuguide.losses import dice_focal
from nuguide.types import Sample

STILL = Augmentation(
    rotate=False, scale=(1, 1), elastic_px=0,
    gain=(1, 1), gamma=(1, 1), brightness=0, contrast=(1, 1), clahe=0, stain=0, stain_shift=0,
)


class MeanColor(nn.Module):
    """A guide that says the mean color of each 16 x 16 cell: turning its input turns its output, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Conv2d(3, 3, 16, stride=16, groups=3, bias=False)
        nn.init.constant_(self.mean.weight, 1 / 256)

    def forward(self, image: Tensor) -> Tensor:
        return self.mean(image)


@pytest.fixture
def mean_color() -> FrozenGuide:
    spec = dataclasses.replace(GUIDES["efficientnet_lite0"], name="mean_color", channels=3)
    return FrozenGuide(MeanColor(), spec, "constant")


def drawn(size: tuple[int, int] = (48, 48), name: str = "one", group: str = "all", seed: int = 0) -> Picture:
    """Smooth noise with four nuclei."""
    image = cv2.GaussianBlur(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8), (0, 0), 2)
    labels = np.zeros(size, np.int32)
    for number, (y, x) in enumerate([(1, 1), (1, 3), (3, 1), (3, 3)], start=1):
        cv2.circle(labels, (x * size[1] // 4, y * size[0] // 4), min(size) // 10, number, -1)
    return Picture(name, group, image, labels)


def same(one: tuple, other: tuple) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one[:2], other[:2], strict=True))


def test_a_picture_is_the_sample_at_the_networks_resolution(tissue: Sample) -> None:
    coarse = picture(tissue, 1.0)                        # 256 px at 0.5 microns: 128 px at 1 micron
    assert coarse.image_rgb.shape == (128, 128, 3)
    assert coarse.labels.dtype == np.int32
    assert set(np.unique(coarse.labels)) == set(np.unique(tissue.labels))
    assert np.count_nonzero(coarse.labels) == pytest.approx(np.count_nonzero(tissue.labels) / 4, rel=0.02)
    assert (coarse.id, coarse.group) == ("drawn", "drawn")


# --- which picture ---


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        (0, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        (1, [1 / 6, 1 / 6, 1 / 6, 1 / 2]),               # either group half of the draws
        (0.5, [0.2113, 0.2113, 0.2113, 0.3660]),         # 1/sqrt(3) each and 1, over sqrt(3) + 1
    ],
)
def test_drawing_weights_by_hand(balance: float, expected: list[float]) -> None:
    assert drawing_weights(["a", "a", "a", "b"], balance) == pytest.approx(expected, abs=1e-4)


def test_pictures_are_drawn_as_often_as_their_weights_say() -> None:
    # flat pictures of gray levels 0, 50, 100 in one group and 150 in another
    pictures = [
        Picture(str(i), group, np.full((8, 8, 3), 50 * i, np.uint8), np.zeros((8, 8), np.int32))
        for i, group in enumerate("aaab")
    ]
    patches = Patches(pictures, 8, STILL, seed=0, balance=1)
    seen = Counter(int(patches[i][0][0, 0, 0]) // 50 for i in range(1200))
    assert [seen[i] / 1200 for i in range(4)] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2], abs=0.04)


# --- which patch ---


def test_a_patch_is_a_function_of_the_seed_and_its_number() -> None:
    pictures = [drawn(seed=s) for s in range(3)]
    one, other = (Patches(pictures, 32, Augmentation(), seed=7) for _ in range(2))
    forward, backward = [one[i] for i in range(6)], [other[i] for i in reversed(range(6))]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    assert not any(same(forward[i], forward[j]) for i in range(6) for j in range(i))
    assert not same(Patches(pictures, 32, Augmentation(), seed=8)[0], forward[0])


def test_targets_are_those_of_the_patchs_labels() -> None:
    # without augmentation the patch is the picture turned, and so are its targets
    whole = drawn((32, 32))
    image, target, latent, _ = Patches([whole], 32, STILL, seed=0)[0]
    assert latent is None
    ways = [(turns, flip) for turns in range(4) for flip in (False, True)]
    (way,) = [way for way in ways if np.array_equal(turned(whole.image_rgb, *way), image)]
    assert np.array_equal(target, targets(turned(whole.labels, *way)))


@pytest.mark.parametrize("how", [STILL, dataclasses.replace(Augmentation(), clahe=0.5, noise=20.0)])
def test_the_image_shows_what_lies_around_its_patch_and_the_patch_is_as_it_is_alone(how: Augmentation) -> None:
    # one seed draws one place and one change of it, with and without what is around it
    pictures = [drawn((96, 96))]
    alone = Patches(pictures, 32, how, seed=5)
    wide = Patches(pictures, 32, how, seed=5, around=32)
    for number in range(40):
        image, target, *_ = wide[number]
        assert image.shape == (96, 96, 3)
        assert np.array_equal(image[32:64, 32:64], alone[number][0])
        assert np.array_equal(target, alone[number][1])


def test_collate_stacks_patches_with_channels_last_in_memory() -> None:
    patches = Patches([drawn()], 32, Augmentation(), seed=0)
    batch = collate([patches[0], patches[1]])
    assert batch.image.shape == (2, 3, 32, 32)
    assert batch.image.dtype == batch.target.dtype == torch.float32
    assert batch.image.is_contiguous(memory_format=torch.channels_last)
    assert batch.target.shape == (2, 2, 32, 32)
    assert batch.latent is None
    assert np.array_equal(batch.image[1].permute(1, 2, 0).numpy(), patches[1][0])


# --- cached latents ---


def test_the_lattice_steps_by_half_a_patch_and_ends_flush_with_the_border() -> None:
    # patches of 32 in 100 x 48: rows from 0, 16, ... 64 and 68, columns from 0 and 16
    rows = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 48, axis=1)
    columns = np.repeat(np.arange(48, dtype=np.uint8)[None], 100, axis=0)
    whole = Picture("p", "g", np.stack([rows, columns, rows], 2), np.zeros((100, 48), np.int32))
    starts = {tuple(lattice_patch(whole, 32, np.random.default_rng(s))[0][0, 0, :2].tolist()) for s in range(200)}
    assert starts == {(row, column) for row in (0, 16, 32, 48, 64, 68) for column in (0, 16)}


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (20, 70)])
def test_a_cached_latent_is_that_of_the_turned_patch(
    size: tuple[int, int], mean_color: FrozenGuide, tmp_path: Path
) -> None:
    cache = LatentCache(tmp_path, 10**7)
    patches = Patches([drawn(size)], 32, STILL, seed=0, guide=mean_color, cache=cache)
    ways = set()
    for i in range(40):
        image, target, latent, _ = patches[i]
        assert latent is not None
        assert image.shape == (32, 32, 3)
        seen = mean_color(torch.from_numpy(image).permute(2, 0, 1)[None].float())[0]
        torch.testing.assert_close(latent.float(), seen, atol=0.1, rtol=0)     # fp16 near 128 is exact to 1/16
        ways.add(latent.numpy().tobytes())
    assert len(ways) >= 8                                # of one cached latent there are eight orientations


def test_a_latent_is_computed_once_for_each_place_of_the_lattice(mean_color: FrozenGuide, tmp_path: Path) -> None:
    calls = []
    mean_color.register_forward_hook(lambda *_: calls.append(1))
    patches = Patches([drawn()], 32, Augmentation(), 0, guide=mean_color, cache=LatentCache(tmp_path, 10**7))
    for i in range(60):
        patches[i]
    assert len(calls) == 4                               # rows and columns from 0 and 16
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_color_varies_for_the_network_while_the_latent_stays(mean_color: FrozenGuide, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, 10**7)
    plain = Patches([drawn((32, 32))], 32, STILL, 0, guide=mean_color, cache=cache)[0]
    colored = Patches(
        [drawn((32, 32))], 32, dataclasses.replace(STILL, brightness=40), 0, guide=mean_color, cache=cache
    )[0]
    assert plain.latent is not None
    assert colored.latent is not None
    assert torch.equal(plain.latent, colored.latent)
    assert np.array_equal(plain[1], colored[1])
    assert not np.array_equal(plain[0], colored[0])


def test_a_latent_is_pooled_to_what_the_fusion_needs(mean_color: FrozenGuide, tmp_path: Path) -> None:
    patches = Patches(
        [drawn((64, 64))], 64, STILL, 0, guide=mean_color, cache=LatentCache(tmp_path, 10**7), pool=2
    )
    batch = collate([patches[0], patches[1]])
    assert batch.latent is not None
    assert batch.latent.shape == (2, 3, 2, 2)            # 4 x 4 cells, pooled once
    assert batch.latent.dtype is torch.float32


@pytest.mark.parametrize("cached", [False, True])
def test_pictures_smaller_than_a_patch_are_mirrored(cached: bool, mean_color: FrozenGuide, tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, 10**7) if cached else None
    whole = drawn((20, 24))
    image, target, *_ = Patches([whole], 32, STILL, 0, guide=mean_color if cached else None, cache=cache)[0]
    assert image.shape == (32, 32, 3)
    assert target.shape == (2, 32, 32)
    colors = {tuple(c) for c in whole.image_rgb.reshape(-1, 3).tolist()}
    assert {tuple(c) for c in image.reshape(-1, 3).tolist()} <= colors         # no black border, nothing invented


def test_turning_by_hand() -> None:
    image = np.array([[1, 2], [3, 4]])
    assert turned(image, 0, False).tolist() == [[1, 2], [3, 4]]
    assert turned(image, 1, False).tolist() == [[2, 4], [1, 3]]                # a quarter turn to the left
    assert turned(image, 1, True).tolist() == [[4, 2], [3, 1]]                 # then flipped from left to right


# --- what is not taught ---


@pytest.mark.parametrize("cached", [False, True])
def test_labels_in_the_ignored_area_change_nothing_that_is_taught(
    cached: bool, mean_color: FrozenGuide, tmp_path: Path
) -> None:
    ignore = np.zeros((96, 96), bool)
    ignore[:, 40:] = True
    plain = drawn((96, 96))
    vague = dataclasses.replace(plain, ignore=ignore)
    changed = dataclasses.replace(vague, labels=np.where(ignore, 7, plain.labels).astype(np.int32))

    def patches(one: Picture) -> Patches:
        cache = LatentCache(tmp_path, 10**7) if cached else None
        return Patches([one], 64, Augmentation(), 3, guide=mean_color if cached else None, cache=cache)

    ignored = 0
    for i in range(6):
        of_plain, of_vague, of_changed = (patches(one)[i] for one in (plain, vague, changed))
        assert np.array_equal(of_plain[0], of_vague[0])                        # the same place, the same colors
        assert np.array_equal(of_vague[1], of_changed[1])
        logits = torch.randn(1, 2, 64, 64, generator=torch.Generator().manual_seed(i))
        losses = [dice_focal(logits, torch.from_numpy(part[1])[None]) for part in (of_vague, of_changed)]
        assert torch.equal(*losses)
        assert set(np.unique(of_vague[1])) <= {-1, 0, 1}
        assert np.array_equal(of_vague[1][0] < 0, of_vague[1][1] < 0)
        ignored += int((of_vague[1][0] < 0).sum())
        outside = of_vague[1][0] >= 0
        assert np.array_equal(of_vague[1][0][outside], of_plain[1][0][outside])
    assert ignored > 64 * 64                             # more than one of six patches


def test_the_ignored_area_comes_to_the_networks_resolution(tissue: Sample) -> None:
    ignore = np.zeros((256, 256), bool)
    ignore[:128] = True
    coarse = picture(dataclasses.replace(tissue, ignore=ignore), 1.0)
    assert coarse.ignore is not None
    assert coarse.ignore.shape == (128, 128)
    assert coarse.ignore[:64].all()
    assert not coarse.ignore[64:].any()
    assert coarse.labels[:64].any()                      # whoever scores still sees them
    assert picture(tissue, 1.0).ignore is None


# --- pictures that are hard, that teach one map alone, or that are shown at many resolutions ---


def test_hard_pictures_are_drawn_more_often_by_hand() -> None:
    even = np.full(4, 1 / 4)
    # losses 1, 2, 3 and one unknown, which counts as their mean 2: factors 1/2, 1, 3/2, 1, in all 4
    recent = np.array([1.0, 2.0, 3.0, np.nan])
    assert harder(even, recent, 1) == pytest.approx([1 / 8, 1 / 4, 3 / 8, 1 / 4])
    # squared: 1/4, 1, 9/4, 1, in all 18/4
    assert harder(even, recent, 2) == pytest.approx([1 / 18, 4 / 18, 9 / 18, 4 / 18])
    # 0 and 2, at the power of 3: factors 0 and 8, held at 1/4 and 4
    assert harder(np.full(2, 1 / 2), np.array([0.0, 2.0]), 3) == pytest.approx([1 / 17, 16 / 17])
    assert harder(even, np.full(4, np.nan), 1) is even


def test_a_patch_knows_its_picture_before_it_is_made() -> None:
    pictures = [replace(drawn(), image_rgb=np.full((48, 48, 3), 50 * i, np.uint8)) for i in range(3)]
    patches = Patches(pictures, 16, STILL, seed=3)
    shown = [int(patches[i][0][0, 0, 0]) // 50 for i in range(12)]
    assert [patches.picture_of(i) for i in range(12)] == shown
    assert len(set(shown)) == 3


@pytest.mark.parametrize("cached", [False, True])
def test_a_nucleus_that_a_patch_cuts_has_the_interior_of_the_whole_one(
    cached: bool, mean_color: FrozenGuide, tmp_path: Path
) -> None:
    # each pixel's color tells its place; with 12 px between nuclei and borders all of a nucleus lies in the margin
    rows, columns = np.mgrid[:96, :96].astype(np.uint8)
    labels = np.zeros((96, 96), np.int32)
    for number, (y, x) in enumerate([(30, 30), (30, 66), (66, 30), (66, 66)], start=1):
        cv2.circle(labels, (x, y), 10, number, -1)
    whole = Picture("one", "all", np.stack([rows, columns, np.full_like(rows, 255)], axis=2), labels)
    cache = LatentCache(tmp_path, 10**7) if cached else None
    patches = Patches([whole], 32, STILL, 0, guide=mean_color if cached else None, cache=cache)
    true, cut = targets(labels), 0
    for number in range(30):
        image, target, *_ = patches[number]
        expected = true[:, image[..., 0], image[..., 1]]
        assert np.array_equal(target, expected)
        cut += int(target[0][[0, -1]].any())
    assert cut > 10


def test_gaps_count_for_the_interior_map_alone() -> None:
    labels = np.zeros((32, 32), np.int32)
    labels[4:28, 2:16], labels[4:28, 16:30] = 1, 2
    whole = replace(drawn((32, 32)), labels=labels)
    assert Patches([whole], 32, STILL, seed=0)[0].weight is None
    patches = Patches([whole], 32, STILL, seed=0, gap_weight=5.0)
    weight = collate([patches[0], patches[1]]).weight
    assert weight is not None
    assert weight.shape == (2, 2, 32, 32)
    assert set(weight[:, 0].unique().tolist()) == {1.0}
    assert set(weight[:, 1].unique().tolist()) == {1.0, 5.0}
    between = gaps(labels, targets(labels)[1])           # turned as the patch may be
    assert between.any()
    assert int((weight[0, 1] == 5).sum()) == np.count_nonzero(between)


def test_a_semantic_picture_teaches_the_nucleus_map_alone() -> None:
    whole = drawn((32, 32))
    _, both, *_ = Patches([whole], 32, STILL, seed=0)[0]
    _, one, *_ = Patches([replace(whole, semantic_only=True)], 32, STILL, seed=0)[0]
    assert np.array_equal(one[0], both[0])
    assert (one[1] == -1).all()
    # whatever is predicted for the interior costs nothing, and is not changed
    logits = torch.zeros(1, 2, 32, 32, requires_grad=True)
    dice_focal(logits, torch.from_numpy(one)[None]).backward()
    assert logits.grad is not None
    assert torch.count_nonzero(logits.grad[0, 1]) == 0
    assert torch.count_nonzero(logits.grad[0, 0]) == 32 * 32


def test_patches_show_a_picture_at_every_resolution_of_the_range() -> None:
    # a disk of 40 px radius, held at 0.25 and shown at 0.25 to 1 micron per pixel: its radius is 10 to 40 px
    labels = cv2.circle(np.zeros((128, 128), np.int32), (64, 64), 40, 1, -1)
    whole = Picture("disk", "all", np.zeros((128, 128, 3), np.uint8), labels)
    patches = Patches([whole], 128, STILL, seed=0, factors=(0.25, 1.0))
    # mirrored at its border, a small picture fills the patch: what counts is the share of the nucleus in its target
    depth = [cv2.distanceTransform((patches[i][1][0] == 1).astype(np.uint8), cv2.DIST_L2, 5).max() for i in range(60)]
    assert min(depth) == pytest.approx(10, abs=1.5)
    assert max(depth) == pytest.approx(40, abs=3)
    # evenly on a log scale: as many below 20 px as above, within what 60 draws vary by
    assert np.mean([radius < 20 for radius in depth]) == pytest.approx(0.5, abs=0.2)


def test_a_resized_picture_keeps_labels_and_what_is_ignored() -> None:
    whole = replace(drawn((48, 48)), ignore=np.tri(48, dtype=bool))
    half = resized(whole, 0.5)
    assert half.image_rgb.shape == (24, 24, 3)
    assert set(np.unique(half.labels)) == {0, 1, 2, 3, 4}
    assert half.ignore is not None
    assert half.ignore.mean() == pytest.approx(0.5, abs=0.03)
    assert resized(whole, 1.0).image_rgb is whole.image_rgb
