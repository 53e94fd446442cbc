"""Stain normalization on drawn tissue whose stains are known, and on all that is no tissue."""

from __future__ import annotations

import json
import time

import cv2
import numpy as np
import pytest

from conftest import draw_tissue
from nuguide.normalize import METHODS, StainNormalizer, measure_macenko, measure_vahadane, sparse_amounts
from nuguide.types import UserError

NAMES = sorted(METHODS)
BY_STAINS = ["macenko", "vahadane"]
RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
OTHER = np.array([[0.75, 0.60, 0.25], [0.20, 0.93, 0.30]])       # bluer hematoxylin, redder eosin
STAINS = {"ruifrok": RUIFROK, "other": OTHER, "pale": np.array([[0.55, 0.75, 0.36], [0.15, 0.95, 0.25]])}
ANGLE = 2.0                                                      # degrees within which stains are found


def draw(stains: np.ndarray, strength: tuple[float, float] = (1.0, 1.0), seed: int = 0, side: int = 256) -> np.ndarray:
    """Disks of hematoxylin on eosin and glass, (side, side, 3) uint8, with noise of one gray level.

    Amounts at `strength` 1: nuclei have 0.8 to 1.6 of hematoxylin and hardly any eosin, stroma 0.3 to 0.9 of eosin and
    hardly any hematoxylin, a border of glass nothing.
    """
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.random((side, side)), (0, 0), 8)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    hematoxylin, eosin = np.zeros((2, side, side))
    eosin[16:, 16:] = (0.3 + 0.6 * smooth)[16:, 16:]
    for x, y in rng.integers(24, side - 8, (side * side // 600, 2)).tolist():
        cv2.circle(hematoxylin, (x, y), 6, rng.uniform(0.8, 1.6), -1)
        cv2.circle(eosin, (x, y), 6, 0.02, -1)
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    density = np.stack([hematoxylin, eosin], axis=-1) * strength @ stains
    return np.clip(np.rint(256 * np.exp(-density) - 1 + rng.normal(0, 1, (side, side, 3))), 0, 255).astype(np.uint8)


def angles(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Degrees between the rows of two stain matrices."""
    true = true / np.linalg.norm(true, axis=1, keepdims=True)
    return np.degrees(np.arccos(np.clip((found[:, :3] * true).sum(1), -1, 1)))


def marked(image: np.ndarray, ink: tuple[int, int, int], share: float = 0.25) -> np.ndarray:
    """The image with a stroke of ink, the `share` of its rows at the top."""
    image = image.copy()
    stroke = image[: int(len(image) * share)]
    stroke[:] = np.rint(stroke * (np.array(ink) / 255)).astype(np.uint8)
    return image


@pytest.mark.parametrize("kind", STAINS)
@pytest.mark.parametrize("name", BY_STAINS)
def test_the_stains_of_drawn_tissue_are_found_again(name: str, kind: str) -> None:
    for seed in range(3):
        found = METHODS[name].measure(draw(STAINS[kind], seed=seed))
        assert found is not None
        assert angles(found, STAINS[kind]).max() < ANGLE


def test_the_strengths_are_those_that_were_drawn() -> None:
    once, twice = (measure_macenko(draw(RUIFROK, strength)) for strength in ((0.6, 1.2), (1.2, 0.6)))
    assert once is not None
    assert twice is not None
    assert twice[:, 3] / once[:, 3] == pytest.approx([2, 0.5], rel=0.1)


@pytest.mark.parametrize("name", BY_STAINS)
def test_the_target_is_the_middle_of_the_training_images(name: str) -> None:
    images = [draw(RUIFROK, seed=seed) for seed in range(4)]
    target = StainNormalizer(name).fit(iter(images)).target
    with_one_odd = StainNormalizer(name).fit([*images, draw(OTHER, (0.3, 0.3))]).target
    assert target is not None
    assert with_one_odd is not None
    assert angles(with_one_odd, target[:, :3]).max() < 1.5
    assert with_one_odd[:, 3] == pytest.approx(target[:, 3], rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_other_stains_and_strengths_come_to_the_target(name: str) -> None:
    target, given = draw(RUIFROK, seed=1), draw(OTHER, (0.7, 0.7), seed=2)
    truth = draw(RUIFROK, seed=2)                                # the same tissue under the target's stains
    changed = StainNormalizer(name).fit([target]).apply(given)
    before, after = (np.abs(image.astype(float) - truth).mean() for image in (given, changed))
    assert before > 15
    assert after < {"macenko": 4, "vahadane": 3, "reinhard": 7}[name]
    measured, wanted = METHODS[name].measure(changed), METHODS[name].measure(target)
    assert measured is not None
    assert wanted is not None
    if name == "reinhard":
        assert measured == pytest.approx(wanted, abs=3)          # of 100
    else:
        assert angles(measured, wanted[:, :3]).max() < 3
        assert measured[:, 3] == pytest.approx(wanted[:, 3], rel=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_dim_camera_changes_nothing(name: str) -> None:
    image, normalizer = draw(OTHER, seed=2), StainNormalizer(name).fit([draw(RUIFROK, seed=1)])
    dim = np.rint(image * 0.6).astype(np.uint8)
    assert np.abs(normalizer.apply(dim).astype(int) - normalizer.apply(image)).mean() < 4


@pytest.mark.parametrize("name", BY_STAINS)
def test_more_of_one_stain_and_less_of_the_other_is_put_right(name: str) -> None:
    given = draw(OTHER, (0.6, 1.4), seed=2)
    changed = StainNormalizer(name).fit([draw(RUIFROK, seed=1)]).apply(given)
    assert np.abs(given.astype(float) - draw(RUIFROK, seed=2)).mean() > 25
    assert np.abs(changed.astype(float) - draw(RUIFROK, seed=2)).mean() < 4


@pytest.mark.parametrize("name", NAMES)
def test_glass_stays_glass(name: str) -> None:
    changed = StainNormalizer(name).fit([draw(RUIFROK)]).apply(draw(OTHER, (0.6, 1.4)))
    assert changed[:16].mean() > 250


@pytest.mark.parametrize("name", NAMES)
def test_a_second_time_changes_little(name: str) -> None:
    normalizer = StainNormalizer(name).fit([draw(RUIFROK, seed=seed) for seed in range(3)])
    once = normalizer.apply(draw(OTHER, (0.7, 0.7), seed=5))
    assert np.abs(normalizer.apply(once).astype(int) - once).mean() < 1


@pytest.mark.parametrize("name", NAMES)
def test_the_same_image_gives_the_same_result_and_is_left_alone(name: str) -> None:
    image = draw(OTHER)
    kept = image.copy()
    first, second = (StainNormalizer(name).fit([draw(RUIFROK)]).apply(image) for _ in range(2))
    assert np.array_equal(first, second)
    assert np.array_equal(image, kept)
    assert first.dtype == np.uint8
    assert first.shape == image.shape


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_from_json_as_it_was(name: str) -> None:
    normalizer = StainNormalizer(name).fit([draw(RUIFROK), draw(OTHER)])
    again = StainNormalizer.from_dict(json.loads(json.dumps(normalizer.to_dict(), allow_nan=False)))
    assert np.array_equal(again.apply(draw(OTHER, seed=3)), normalizer.apply(draw(OTHER, seed=3)))
    assert again.to_dict() == normalizer.to_dict()


INKS = {"blue": (30, 60, 170), "green": (20, 130, 60), "black": (25, 25, 25)}


def odd_images() -> dict[str, np.ndarray]:
    """What a slide holds beside tissue, all of which must come through."""
    rng = np.random.default_rng(0)
    blank = np.clip(rng.normal(240, 3, (128, 128, 3)), 0, 255).astype(np.uint8)
    nearly = blank.copy()
    nearly[60:64, 60:64] = (100, 60, 140)
    return {
        "white": np.full((64, 64, 3), 255, np.uint8),
        "blank": blank,
        "nearly blank": nearly,
        "black": np.zeros((64, 64, 3), np.uint8),
        "one pixel": np.full((1, 1, 3), (120, 60, 140), np.uint8),
        "one row": np.full((1, 300, 3), (120, 60, 140), np.uint8),
        "no pixel": np.zeros((0, 10, 3), np.uint8),
        "one color": np.full((64, 64, 3), (120, 60, 140), np.uint8),
        "gray": np.repeat(rng.integers(0, 256, (64, 64, 1), np.uint8), 3, axis=2),
        **{f"{name} ink": np.full((64, 64, 3), ink, np.uint8) for name, ink in INKS.items()},
        **{f"{name} ink on glass": marked(blank, ink) for name, ink in INKS.items()},
    }


@pytest.mark.parametrize("odd", odd_images())
@pytest.mark.parametrize("name", NAMES)
def test_what_shows_no_two_stains_is_left_as_it_is(name: str, odd: str) -> None:
    image = odd_images()[odd]
    assert StainNormalizer(name).fit([draw(RUIFROK)]).apply(image) is image


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(6))
def test_noise_of_every_kind_comes_through(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    low, high = sorted(rng.integers(0, 256, 2).tolist())
    image = rng.integers(low, high + 1, (40, 60, 3)).astype(np.uint8)
    changed = StainNormalizer(name).fit([draw(RUIFROK)]).apply(image)
    assert changed.shape == image.shape
    assert changed.dtype == np.uint8


def test_one_stain_alone_is_not_taken_for_two() -> None:
    eosin = np.random.default_rng(0).uniform(0.3, 0.9, (128, 128, 1)) * (RUIFROK[1] / np.linalg.norm(RUIFROK[1]))
    image = np.rint(256 * np.exp(-eosin) - 1).astype(np.uint8)
    assert measure_macenko(image) is None
    assert measure_vahadane(image) is None


@pytest.mark.parametrize("ink", INKS)
@pytest.mark.parametrize("name", BY_STAINS)
def test_ink_does_not_change_what_is_found(name: str, ink: str) -> None:
    image = draw(RUIFROK, seed=4)
    clean, inked = METHODS[name].measure(image), METHODS[name].measure(marked(image, INKS[ink]))
    assert clean is not None
    assert inked is not None
    assert angles(inked, RUIFROK).max() < angles(clean, RUIFROK).max() + 3


@pytest.mark.parametrize("name", NAMES)
def test_images_without_tissue_do_not_count_for_the_target(name: str) -> None:
    odd = odd_images()
    alone = StainNormalizer(name).fit([draw(RUIFROK)])
    among = StainNormalizer(name).fit([odd["white"], draw(RUIFROK), odd["black"], odd["blue ink"]])
    assert among.to_dict() == alone.to_dict()
    with pytest.raises(UserError, match=f"none of 2 images shows enough stained tissue to fit {name} to"):
        StainNormalizer(name).fit([odd["white"], odd["black"]])


def test_sparse_amounts_are_the_best_of_a_fine_grid() -> None:
    stains = RUIFROK / np.linalg.norm(RUIFROK, axis=1, keepdims=True)
    density = np.random.default_rng(0).uniform(0, 1, (20, 3)) * [1, 1, 0.3]
    grid = np.stack(np.meshgrid(np.linspace(0, 2, 201), np.linspace(0, 2, 201)), axis=-1).reshape(-1, 2)

    def cost(amounts: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        return ((pixel - amounts @ stains) ** 2).sum(-1) / 2 + 0.1 * amounts.sum(-1)

    for pixel, amounts in zip(density, sparse_amounts(density, stains), strict=True):
        assert amounts.min() >= 0
        assert cost(amounts, pixel) <= cost(grid, pixel).min() + 1e-9


def test_bands_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    image = draw_tissue()[0]
    for name in NAMES:
        normalizer = StainNormalizer(name).fit([draw(RUIFROK)])
        whole = normalizer.apply(image)
        monkeypatch.setattr("nuguide.normalize.BAND", 1000)
        assert np.array_equal(normalizer.apply(image), whole)
        monkeypatch.undo()


def test_a_megapixel_takes_well_under_a_second() -> None:
    image = np.tile(draw(OTHER), (4, 4, 1))
    for name in NAMES:
        normalizer = StainNormalizer(name).fit([draw(RUIFROK)])
        seconds = []
        for _ in range(2):
            start = time.process_time()
            normalizer.apply(image)
            seconds.append(time.process_time() - start)
        assert min(seconds) < 1, name


def test_unknown_names_and_broken_descriptions_are_refused() -> None:
    with pytest.raises(ValueError, match="choose from macenko, reinhard, vahadane"):
        StainNormalizer("hokusai")
    with pytest.raises(ValueError, match="no target yet"):
        StainNormalizer("macenko").apply(draw(RUIFROK))
    whole = StainNormalizer("macenko").fit([draw(RUIFROK)]).to_dict()
    broken = [
        {}, {"name": "macenko"}, {**whole, "eosin": [1, 2, 3]}, {**whole, "eosin": [1, 2, 3, None]},
        {**whole, "eosin": [1, 2, 3, float("nan")]}, {**whole, "eosin": "pink"}, [],
    ]  # fmt: skip
    for stored in broken:
        with pytest.raises(ValueError, match="stain normalization|numbers"):
            StainNormalizer.from_dict(stored)  # pyright: ignore[reportArgumentType]
