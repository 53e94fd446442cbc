"""The command line as a user meets it: what it writes, says and returns, whatever it is given."""

from __future__ import annotations

import dataclasses
import inspect
import io
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import tifffile
import torch

import trees
from conftest import PLAIN, draw_tissue, names, nuguide, segment
from fakes import ByColor
from nuguide import __version__, checkpoint
from nuguide.augment import Augmentation
from nuguide.checkpoint import ModelSpec
from nuguide.cli import COMMANDS
from nuguide.export import read_geojson
from nuguide.images import read_image
from nuguide.measure import COLUMNS
from nuguide.metrics import panoptic_quality
from nuguide.predict import Predictor
from nuguide.recipe import TrainOptions

ENDINGS = (".csv", ".geojson", ".labels.tif", ".overlay.png")


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """160 x 200 pixels of tissue at 0.5 microns per pixel, and its truth."""
    return draw_tissue(0, (160, 200), 20)


@pytest.fixture
def image(tmp_path: Path, drawn) -> Path:
    path = tmp_path / "in" / "tissue.png"
    path.parent.mkdir()
    PIL.Image.fromarray(drawn[0]).save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# The program


def test_the_version_is_told(capsys):
    assert nuguide("--version") == nuguide("-V") == 0
    assert capsys.readouterr().out == f"nuguide {__version__}\n" * 2


def options_of(command: str) -> list[str]:
    """Every option that a command's function has, as it is typed."""
    parameters = inspect.signature(COMMANDS[command]).parameters.values()
    found = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY and p.name != "options"]
    if command == "train":
        found += [f.name for f in (*dataclasses.fields(TrainOptions), *dataclasses.fields(Augmentation))]
        found.remove("augmentation")
    return [f"--{name.replace('_', '-')}" for name in found]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option(command, capsys):
    assert nuguide(command, "--help") == 0
    said = capsys.readouterr().out
    assert COMMANDS[command].__doc__.splitlines()[0] in said  # pyright: ignore[reportOptionalMemberAccess]
    for option in options_of(command):
        assert option in said


def test_help_shows_every_command(capsys):
    assert nuguide("--help") == 0
    said = capsys.readouterr().out
    for command in COMMANDS:
        assert command in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "frobnicate"),
        ([], "segment, train, evaluate"),
        (["segment", "a.png"], "--out"),
        (["segment", "a.png", "--out", "o", "--nonsense"], "--nonsense"),
        (["segment", "a.png", "--out", "o", "--device", "tpu"], "tpu"),
        (["segment", "a.png", "--out", "o", "--mpp", "fine"], "fine"),
        (["segment", "a.png", "--out", "o", "--mpp", "0"], "--mpp 0.0: must lie between 0.05 and 5"),
        (["segment", "a.png", "--out", "o", "--mpp", "250"], "a 40x scan has about 0.25"),
        (["segment", "a.png", "--out", "o", "--formats", "labels,word"], "choose one or more of labels,geojson,csv"),
        (["segment", "--out", "o"], "nothing to segment; name image files, slides, or folders of them"),
        (["segment", "a.png", "--out", "o", "--model", "best"], "best: no such model; give "),
        (["train", "--out", "o"], "no data; name a FOLDER"),
        (["train", "here", "--out", "o", "--latents", "warm"], "unknown latents 'warm'; choose from live, cached"),
        (["train", "here", "--out", "o", "--epochs", "0"], "epochs must be positive, not 0"),
        (["train", "here"], "--out"),
        (["evaluate"], "no data; name a FOLDER"),
        (["evaluate", "here"], "here does not exist; looked for a folder with images/"),
        (["evaluate", "tnbc=here"], "here does not exist; looked for"),
        (["evaluate", "brain=here"], "brain=here: brain is no data set; choose from folder, nuinsseg, tnbc"),
    ],
)
def test_a_wrong_command_returns_2_and_says_why(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nuguide(*arguments) == 2
    heard = capsys.readouterr()
    assert said in " ".join((heard.out + heard.err).replace("│", " ").split())
    assert "Traceback" not in heard.err
    assert names(tmp_path) == [], "nothing is made for a wrong command"


def test_help_is_there_without_torch():
    """`nuguide --help` in a fresh process, which then must not have loaded what takes seconds."""
    code = (
        "import sys, nuguide, nuguide.cli\n"
        "try: nuguide.cli.main(['segment', '--help'])\n"
        "except SystemExit: print({'torch', 'pandas', 'tifffile'} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == "set()\n"
    assert "--formats" in ended.stdout


def test_a_reader_that_has_enough_is_no_trouble():
    """As in `nuguide train --help | head -1`."""
    pipe_out, pipe_in = os.pipe()
    os.close(pipe_out)
    with os.fdopen(pipe_in, "w") as closed:
        command = [sys.executable, "-m", "nuguide.cli", "train", "--help"]
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.stderr == ""


# Segment


def test_segment_writes_what_it_promises(image, out, model, drawn, capsys):
    assert segment(image, out, model, "--mpp", 0.5) == 0
    assert names(out) == ["summary.csv", *(f"tissue{ending}" for ending in ENDINGS)]
    labels = tifffile.imread(out / "tissue.labels.tif")
    assert (labels.shape, labels.dtype) == ((160, 200), np.uint32)
    assert panoptic_quality(drawn[1], labels).pq > 0.85
    table = pd.read_csv(out / "tissue.csv")
    assert tuple(table.columns) == COLUMNS
    assert len(table) == labels.max() == drawn[1].max()
    assert len(json.loads((out / "tissue.geojson").read_text())["features"]) == len(table)
    np.testing.assert_array_equal(read_geojson(out / "tissue.geojson", labels.shape), labels)
    assert read_image(out / "tissue.overlay.png").image_rgb.shape == (160, 200, 3)
    summary = pd.read_csv(out / "summary.csv").iloc[0]
    assert summary["nuclei"] == len(table)
    assert summary["model"].startswith(f"{model} (")
    assert f"{len(table)} nuclei in 1 images; results in {out}" in capsys.readouterr().out


@pytest.mark.parametrize("formats", ["csv", "labels,overlay"])
def test_segment_writes_the_formats_asked_for_and_no_other(image, out, model, formats):
    endings = {"csv": ".csv", "labels": ".labels.tif", "overlay": ".overlay.png"}
    assert segment(image, out, model, "--formats", formats) == 0
    assert names(out) == ["summary.csv", *(f"tissue{endings[name]}" for name in formats.split(","))]


def test_segment_says_which_scale_it_took(image, out, model, capsys):
    assert segment(image, out, model, "--formats", "csv") == 0
    assert "the file states no scale: 0.25 microns per pixel assumed (--mpp sets it)" in capsys.readouterr().out
    assert pd.read_csv(out / "summary.csv")["mpp"].tolist() == [0.25]


def test_segment_again_skips_overwrites_and_refuses_to_mix(image, out, model, tmp_path, capsys):
    other = checkpoint.save(tmp_path / "other", ByColor(), ModelSpec("by_color", mpp=0.25))
    assert segment(image, out, model, "--formats", "csv") == 0
    capsys.readouterr()
    assert segment(image.parent, out, model.parent / "." / "model", "--formats", "csv") == 0
    assert "(1 finished before)" in capsys.readouterr().out
    for changed in (["--mpp", 0.5], ["--model", other], ["--flips"]):
        assert segment(image, out, model, "--formats", "csv", *changed) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"failed: {image}: ")
        assert "choose another --out, or --overwrite them" in said
        assert segment(image, out, model, "--formats", "csv", *changed, "--overwrite") == 0
        assert segment(image, out, model, "--formats", "csv", "--overwrite") == 0


def test_a_model_trained_anew_in_the_same_place_is_another_model(image, out, model, monkeypatch):
    assert segment(image, out, model, "--formats", "csv") == 0
    changed = ByColor()
    changed.get_buffer("mean").mul_(0.5)
    checkpoint.save(model, changed, ModelSpec("by_color"))
    assert segment(image, out, model, "--formats", "csv") == 2


def test_batches_and_precision_are_turned(image, out, model, tmp_path):
    assert segment(image, out, model, "--mpp", 0.5, "--batch", 3) == 0
    assert segment(image, tmp_path / "b", model, "--mpp", 0.5, "--precision", "bf16") == 0
    one, other = (tifffile.imread(folder / "tissue.labels.tif") for folder in (out, tmp_path / "b"))
    assert panoptic_quality(one, other).pq > 0.95
    assert segment(image, tmp_path / "c", model, "--batch", 0) == 2


def test_ctrl_c_returns_130_and_the_same_command_goes_on(image, out, model, drawn, monkeypatch, capsys):
    PIL.Image.fromarray(drawn[0]).save(image.with_name("u.png"))
    compute, calls = Predictor.segment, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(self, *arguments)

    monkeypatch.setattr(Predictor, "segment", interrupted)
    assert segment(image.parent, out, model, "--formats", "csv") == 130
    assert "nuguide: stopped; the same command goes on where it was" in capsys.readouterr().err
    assert names(out) == ["summary.csv", "tissue.csv"]
    assert segment(image.parent, out, model, "--formats", "csv") == 0
    assert len(calls) == 3
    assert "(1 finished before)" in capsys.readouterr().out
    assert names(out) == ["summary.csv", "tissue.csv", "u.csv"]


def test_the_installed_program_runs(image, tmp_path):
    """The whole way in a process of its own, with an untrained network, as a user starts it."""
    torch.manual_seed(0)
    spec = ModelSpec("unet", {"width": 2})
    folder = checkpoint.save(tmp_path / "untrained", checkpoint.build(spec), spec)
    (image.parent / "bad.png").write_text("no image")
    command = [sys.executable, "-m", "nuguide.cli", "segment", "in", "--out", "out", "--model", folder, *PLAIN]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert names(tmp_path / "out") == ["summary.csv", *(f"tissue{ending}" for ending in ENDINGS)]
    assert ended.stderr.splitlines()[-1].startswith(f"failed: {Path('in') / 'bad.png'}: is not a PNG")
    assert "Traceback" not in ended.stderr


# Bad input


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bad_file(path: Path, kind: str, picture: np.ndarray) -> Path:
    """A file that is no picture we can take, called `path` whatever it holds."""
    image = PIL.Image.fromarray(picture)
    if kind == "truncated":
        image.save(path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("These are not the nuclei you are looking for.\n" * 20)
    elif kind == "cmyk":
        image.convert("CMYK").save(path, format="JPEG")
    elif kind == "sixteen bits":
        PIL.Image.fromarray(picture[..., 0].astype(np.uint16) * 256).save(path)
    elif kind == "bomb":
        header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


BAD = {
    "truncated": "is damaged or cut short",
    "empty": "is empty (0 bytes)",
    "text": "is not a PNG, JPEG, TIFF or BMP image",
    "cmyk": "CMYK",
    "sixteen bits": "16",
    "bomb": "declares 60000 x 60000 pixels",
    "missing": "there is no such file",
}


def test_a_name_that_the_terminal_cannot_show_does_not_end_the_run(image, out, model, tmp_path, monkeypatch):
    odd = image.rename(image.with_name("細胞.png"))
    shown = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", shown)
    assert segment(odd, out, model) == 0
    shown.flush()
    assert b"\\u7d30\\u80de.png: " in shown.buffer.getvalue()


def test_every_bad_file_gets_one_line_at_the_end_and_the_rest_goes_on(image, out, model, drawn, tmp_path, capsys):
    bad = {kind: bad_file(tmp_path / f"{kind}.png", kind, drawn[0]) for kind in BAD}
    assert segment([*bad.values(), image], out, model, "--mpp", 0.5) == 1
    assert names(out) == ["summary.csv", *(f"tissue{ending}" for ending in ENDINGS)]
    heard = capsys.readouterr()
    assert "Traceback" not in heard.err
    last = heard.err.splitlines()[-len(BAD) :]
    for kind, path in bad.items():
        lines = [line for line in last if line.startswith(f"failed: {path}: ")]
        assert len(lines) == 1
        assert BAD[kind] in lines[0]
        assert ";" in lines[0], "what is wrong; what to do"


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_alone_returns_2_and_leaves_nothing(kind, out, model, drawn, tmp_path, capsys):
    path = bad_file(tmp_path / "bad.png", kind, drawn[0])
    assert segment(path, out, model) == 2
    # so large an image counts as a slide, of which the failure is noted
    assert names(out) == []
    heard = capsys.readouterr()
    assert heard.err.splitlines()[-1].startswith(f"failed: {path}: ")
    assert "0 nuclei in 0 images" in heard.out


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_other_kinds_of_picture_are_taken(image, out, model, mode):
    PIL.Image.open(image).convert(mode).save(image)
    assert segment(image, out, model, "--mpp", 0.5) == 0
    assert tifffile.imread(out / "tissue.labels.tif").shape == (160, 200)


def test_a_folder_that_may_not_be_read_is_named(image, out, model, tmp_path, monkeypatch, capsys):
    closed = tmp_path / "closed"
    closed.mkdir()
    look = Path.iterdir

    def refused(folder: Path) -> Iterator[Path]:        # root may read all, so permissions alone would not do
        if folder == closed:
            raise PermissionError(13, "Permission denied")
        return look(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    assert segment([closed, image], out, model, "--formats", "csv") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"failed: {closed}: cannot be looked into (Permission denied); change its permissions"


def test_a_folder_without_images_is_named(out, model, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    assert segment(tmp_path / "nothing", out, model) == 2
    assert f"failed: {tmp_path / 'nothing'}: holds no image" in capsys.readouterr().err


@contextmanager
def small_files(largest_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size: the write that does fails in its middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system knows no largest file size")
@pytest.mark.parametrize("largest_bytes", [0, 3000])
def test_a_write_that_fails_in_its_middle_leaves_nothing_half_done(image, out, model, largest_bytes, capsys):
    with small_files(largest_bytes):
        assert segment(image, out, model, "--mpp", 0.5) == 2
    left = {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith(".")}
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"failed: {out}")
    assert "not written" in said
    assert segment(image, out, model, "--mpp", 0.5) == 0, "once there is room the same command goes on"
    assert all((out / name).read_bytes() == content for name, content in left.items())     # what was left was whole
    assert len(left) < 4


def test_an_out_that_cannot_be_made_is_named(image, model, capsys):
    assert segment(image, image / "out", model) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"nuguide: {image / 'out'}: no folder can be made here")


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_no_model_and_is_not_opened(image, out, tmp_path, capsys):
    content = pickle.dumps(Attack(tmp_path / "attacked"))
    (tmp_path / "model.pt").write_bytes(content)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text('{"network": "unet", "network_options": {"width": 2}}')
    for given, named in ((tmp_path / "model.pt", tmp_path / "model.pt"), (folder, folder / "model.safetensors")):
        assert segment(image, out, given) == 2
        heard = capsys.readouterr().err.splitlines()
        assert len(heard) == 1
        assert heard[0].startswith(f"nuguide: {named}: ")
        assert ";" in heard[0]
    assert not (tmp_path / "attacked").exists()
    assert not out.exists()


# Train and evaluate


def annotated(folder: Path, images: int = 4, seed: int = 0) -> Path:
    """A data set of drawn images, 96 x 96 pixels, without scale (so 0.25 microns per pixel)."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(images):
        picture, labels = draw_tissue(seed + number, (96, 96), 8)
        PIL.Image.fromarray(picture).save(folder / "images" / f"{number}.png")
        tifffile.imwrite(folder / "labels" / f"{number}.tif", labels.astype(np.uint16))
    return folder


TINY = ["--network", "unet", "--width", 2, "--patch-px", 32, "--epochs", 1, "--steps-per-epoch", 2, "--batch", 2]
TINY += PLAIN


def test_train_then_evaluate_then_segment(tmp_path, image, out, capsys):
    data = annotated(tmp_path / "data")
    unguided, guided = tmp_path / "unguided", tmp_path / "guided"
    assert nuguide("train", data, "--out", unguided, "--fusion", "none", *TINY) == 0
    assert "3 images to train on, 1 to validate on" in capsys.readouterr().out
    assert {"model", "metrics.csv", "curves.png", "split.json", "options.json", "last.ckpt"} <= set(names(unguided))
    assert not any("new" in name for name in names(unguided))
    assert nuguide("train", data, "--out", guided, "--guide-weights", "random:0", *TINY) == 0
    assert json.loads((guided / "model" / "config.json").read_text())["guide_weights"] == "random-0"

    capsys.readouterr()
    both = ["--model", guided / "model", "--against", unguided / "model", "--out", tmp_path / "scores.json"]
    assert nuguide("evaluate", data, *both, "--split", guided / "split.json", *PLAIN) == 0
    said = capsys.readouterr().out
    assert said.count("data, 1 images, ") == 2
    assert f"{guided / 'model'} minus {unguided / 'model'}" in said
    scores = json.loads((tmp_path / "scores.json").read_text())
    held = [member["id"] for member in json.loads((guided / "split.json").read_text())["parts"]["val"]]
    assert [row["id"] for row in scores["images"]] == held
    assert scores["facts"]["split"] == str(guided / "split.json")

    assert segment(image, out, guided / "model", "--formats", "labels") == 0
    assert nuguide("train", data, "--out", unguided, "--fusion", "none", "--val-fraction", 0.5, *TINY) == 2
    assert "made with other images or parts; choose another --out" in capsys.readouterr().err
    assert nuguide("train", data, "--out", unguided, "--fusion", "none", "--lr", 1, *TINY) == 2
    assert "holds a run with other options" in capsys.readouterr().err


def test_evaluate_scores_every_image_of_every_data_set(tmp_path, model, capsys):
    parts = [annotated(tmp_path / name, 2, seed) for name, seed in (("one", 0), ("two", 5))]
    assert nuguide("evaluate", *parts, "--model", model, "--out", tmp_path / "scores.json", *PLAIN) == 0
    said = capsys.readouterr().out
    assert "one, 2 images" in said
    assert "two, 2 images" in said
    rows = json.loads((tmp_path / "scores.json").read_text())["images"]
    assert [(row["dataset"], row["id"]) for row in rows] == [("one", "0"), ("one", "1"), ("two", "0"), ("two", "1")]
    assert min(row["dice"] for row in rows) > 0.8, "this fake knows drawn nuclei"
    capsys.readouterr()
    assert nuguide("evaluate", *parts, "--model", model, "--out", tmp_path / "no" / "scores.json", *PLAIN) == 2
    heard, missing = capsys.readouterr(), tmp_path / "no" / "scores.json"
    assert heard.err.splitlines()[-1] == f"nuguide: {missing}: there is no such folder; make it first"
    assert "2 images" not in heard.out                  # before hours go into scores


def test_evaluate_draws_whole_groups_for_its_intervals(tmp_path, model, capsys):
    data = annotated(tmp_path / "mine", 3)
    (data / "manifest.csv").write_text("id,group\n0,a\n1,a\n2,b\n")
    assert nuguide("evaluate", data, "--model", model, "--by-group", *PLAIN) == 0
    assert "mine, 3 images of 2 groups, drawn whole" in capsys.readouterr().out
    (data / "manifest.csv").write_text("id,group\n0,a\n1,a\n2,a\n")
    assert nuguide("evaluate", data, "--model", model, "--by-group", *PLAIN) == 2
    assert "mine: all images are of one group; leave --by-group out" in capsys.readouterr().err


def test_a_data_set_is_named_with_or_without_its_kind(tmp_path, model, capsys):
    data = annotated(tmp_path / "tnbc=mine", 1)         # a folder may be called like this, too
    for text in (data, f"folder={data}"):
        assert nuguide("evaluate", text, "--model", model, *PLAIN) == 0
        assert "tnbc=mine, 1 images" in capsys.readouterr().out


def test_an_annotator_is_chosen_of_cryonuseg_only(tmp_path, capsys):
    assert nuguide("evaluate", annotated(tmp_path / "data", 1), "--annotator", "annotator2") == 2
    assert "--annotator chooses between those of cryonuseg" in capsys.readouterr().err


def test_two_data_sets_of_one_name_are_refused(tmp_path, model, capsys):
    parts = [annotated(tmp_path / folder / "data", 1) for folder in ("a", "b")]
    assert nuguide("evaluate", *parts, "--model", model, *PLAIN) == 2
    assert "two data sets called data have an image 0; rename one of their folders" in capsys.readouterr().err


def test_the_same_picture_to_train_and_to_validate_on_is_refused(tmp_path, out, capsys):
    data, copy = annotated(tmp_path / "data"), annotated(tmp_path / "copy", 1, seed=2)
    assert nuguide("train", data, "--val", copy, "--out", out, "--fusion", "none", *TINY) == 2
    assert "the same picture stands in both parts (0, 2); remove it from one" in capsys.readouterr().err
    assert names(out) == []


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, image, capsys):
    assert nuguide("train", annotated(tmp_path / "data", 2), "--out", image / "run", "--fusion", "none", *TINY) == 2
    said = "cannot be written (Not a directory); choose another --out"
    assert capsys.readouterr().err == f"nuguide: {image / 'run'}: {said}\n"


def test_one_image_is_too_few_to_hold_one_out(tmp_path, out, capsys):
    assert nuguide("train", annotated(tmp_path / "data", 1), "--out", out, *TINY) == 2
    assert "name images to validate on with --val" in capsys.readouterr().err


def test_a_split_of_other_images_is_refused(tmp_path, model, capsys):
    data = annotated(tmp_path / "data", 1)
    (tmp_path / "split.json").write_text("{}")
    assert nuguide("evaluate", data, "--model", model, "--split", tmp_path / "split.json") == 2
    assert "cannot read the split manifest" in capsys.readouterr().err


def test_training_without_its_extra_says_what_to_install(tmp_path, out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    monkeypatch.delitem(sys.modules, "nuguide.train", raising=False)
    assert nuguide("train", annotated(tmp_path / "data", 2), "--out", out) == 2
    assert "needs pytorch_lightning; install it with: pip install 'nuguide[train]'" in capsys.readouterr().err


def test_ctrl_c_while_training_returns_130(tmp_path, out, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        sys.exit(1)                                     # what Lightning makes of it

    monkeypatch.setattr("nuguide.train.fit", interrupted)
    assert nuguide("train", annotated(tmp_path / "data", 2), "--out", out, "--fusion", "none") == 130


def test_folds_are_written_and_leaks_between_their_parts_found(tmp_path, capsys):
    data = annotated(tmp_path / "data", 6)
    assert nuguide("data", "folds", data, "--out", tmp_path / "folds", "--folds", 3) == 0
    assert names(tmp_path / "folds") == ["fold_0.json", "fold_1.json", "fold_2.json"]
    split = json.loads((tmp_path / "folds" / "fold_0.json").read_text())["parts"]
    assert (len(split["train"]), len(split["val"])) == (4, 2)
    assert nuguide("data", "leaks", tmp_path / "folds" / "fold_0.json", data) == 0
    assert "no leaks" in capsys.readouterr().out

    # a training image, turned, replaces a validation image
    train, val = (split[part][0]["id"] for part in ("train", "val"))
    for folder, ending in (("images", "png"), ("labels", "tif")):
        turned = np.rot90(np.asarray(PIL.Image.open(data / folder / f"{train}.{ending}")))
        PIL.Image.fromarray(turned).save(data / folder / f"{val}.{ending}")
    assert nuguide("data", "leaks", tmp_path / "folds" / "fold_0.json", data) == 2      # not the images it names
    (tmp_path / "folds" / "fold_0.json").unlink()
    assert nuguide("data", "folds", data, "--out", tmp_path / "folds", "--folds", 3) == 0
    assert nuguide("data", "leaks", tmp_path / "folds" / "fold_0.json", data) == 1
    assert f"train: data/{train} " in capsys.readouterr().out
    assert nuguide("data", "folds", data, "--out", tmp_path / "more", "--folds", 7) == 2
    assert "6 groups cannot be divided into 7 folds" in capsys.readouterr().err


def test_conics_own_split_is_one_fold_by_source(tmp_path, capsys):
    pytest.importorskip("sklearn")
    names_of = [f"{cohort}_{i // 2}-{i:04}" for cohort in ("crag", "glas") for i in range(10)]
    data = f"conic={trees.conic(tmp_path / 'conic', names_of)}"
    assert nuguide("data", "folds", data, "--out", tmp_path / "folds", "--split", "own") == 0
    assert "1 fold in" in capsys.readouterr().out
    assert names(tmp_path / "folds") == ["fold_0.json"]
    split = json.loads((tmp_path / "folds" / "fold_0.json").read_text())["parts"]
    held = {member["group"] for member in split["val"]}
    assert (len(split["train"]), len(split["val"]), len(held)) == (16, 4, 2)       # both patches of one source of each
    own = annotated(tmp_path / "data", 2)
    for named, said in (((own,), "data has no split of its own; only conic"), ((data, own), "divides one data set")):
        assert nuguide("data", "folds", *named, "--out", tmp_path / "no", "--split", "own") == 2
        assert said in capsys.readouterr().err


def test_a_set_behind_a_login_is_explained(tmp_path, capsys):
    assert nuguide("data", "fetch", "monuseg", tmp_path) == 2
    assert "see https://monuseg.grand-challenge.org/Data" in capsys.readouterr().out
    assert nuguide("data", "fetch", "imagenet", tmp_path) == 2
    assert "unknown data set 'imagenet'" in capsys.readouterr().err
