"""Processes that train together see what one alone would see, and one of them writes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import draw_tissue
from nuguide import together
from nuguide.datasets import Dataset
from nuguide.datasets.dataset import Entry
from nuguide.recipe import TrainOptions
from nuguide.together import Share, Stretch, leads, mean_of_all, place
from nuguide.train import check_shares
from nuguide.types import UserError

TRAIN = "from nuguide.cli import main\n\nmain()\n"


def as_process(number: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "place", lambda: (number, count))


def test_alone_a_process_leads_and_has_all_of_the_work() -> None:
    assert leads()
    assert place() == (0, 1)
    assert mean_of_all([(0.25, 1.0), (0.75, 1.0)], torch.device("cpu")) == 0.5
    assert mean_of_all([(0.25, 0.5), (0.75, 0.5), (1.0, 1.0)], torch.device("cpu")) == 0.75


@pytest.mark.parametrize(
    ("told", "leading"),
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, True), ({"RANK": "4", "LOCAL_RANK": "0"}, False),
        ({"SLURM_PROCID": "3"}, False), ({"LOCAL_RANK": "1"}, False), ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),
    ],
)
def test_the_leader_is_known_from_what_starts_the_processes(
    told: dict[str, str], leading: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert leads() is leading


def test_the_epochs_of_a_run_use_each_patch_number_once() -> None:
    sampler = Stretch(5, 2)
    assert len(sampler) == 10
    assert list(sampler) == list(range(10))
    sampler.set_epoch(2)
    assert list(sampler) == list(range(20, 30))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_each_step_has_the_same_patches_however_many_processes_share_it(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler, steps = Stretch(4, 6), [[] for _ in range(4)]
    sampler.set_epoch(3)
    for number in range(count):
        as_process(number, count, monkeypatch)
        mine = list(sampler)
        assert len(mine) == len(sampler) == 24 // count
        for index, patch in enumerate(mine):
            steps[index // (6 // count)].append(patch)
    assert [sorted(step) for step in steps] == [list(range(first, first + 6)) for first in range(72, 96, 6)]


def test_each_image_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for number in range(3):
        as_process(number, 3, monkeypatch)
        seen += list(Share(7))
        assert len(Share(7)) == len(list(Share(7)))
    assert sorted(seen) == list(range(7))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four annotated images of four patients."""
    folder = tmp_path / "data"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    rows = ["id,group"]
    for seed in range(4):
        image, labels = draw_tissue(seed, (96, 96), 8, (6, 9))
        Image.fromarray(image).save(folder / "images" / f"{seed}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "labels" / f"{seed}.png")
        rows.append(f"{seed},patient{seed}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def train(data: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """`nuguide train` as a script, for the processes that it starts are told the same."""
    script = data.parent / "train.py"
    script.write_text(TRAIN)
    small = "--fusion none --width 2 --patch-px 32 --batch 4 --epochs 2 --steps-per-epoch 2 --precision fp32"
    command = [sys.executable, script, "train", data, "--out", out, "--val-fraction", "0.5", *small.split(), *more]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300)


def test_two_processes_train_one_model(data: Path, tmp_path: Path) -> None:
    done = train(data, tmp_path / "two", "--devices", "2", "--ema", "0.9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nmodel: ") == done.stdout.count("images to train on") == 1
    with (tmp_path / "two" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [2, 4]
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"model", "split.json", "options.json", "curves.png", "last.ckpt"} <= names
    alone = train(data, tmp_path / "one", "--ema", "0.9")
    assert alone.returncode == 0, alone.stderr
    with (tmp_path / "one" / "metrics.csv").open() as file:
        first = next(csv.DictReader(file))
    # the same patches; batch norm alone sees them two by two
    assert float(rows[0]["train_loss"]) == pytest.approx(float(first["train_loss"]), abs=0.1)


@pytest.mark.parametrize(
    ("options", "images", "processes", "told"),
    [
        ({"batch": 5}, 4, 2, "--batch 5 cannot be shared evenly by 2 processes; choose a multiple of that"),
        ({"hard": 1.0}, 4, 2, "--hard needs one process"),
        ({}, 1, 2, "2 processes need as many images to validate on"),
        ({}, 4, 0, "--devices and --nodes must be 1 or more"),
    ],
)
def test_what_cannot_be_shared_is_refused(options: dict, images: int, processes: int, told: str) -> None:
    held = Dataset("drawn", [Entry(str(number), "g", lambda: pytest.fail("read")) for number in range(images)], "CC0")
    check_shares(TrainOptions(), [held], 1)
    with pytest.raises(UserError, match=told):
        check_shares(TrainOptions(**options), [held], processes)
