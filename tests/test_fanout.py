"""Many images to files: names never collide, finished images are skipped, bad ones reported, cut runs go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import PIL.Image
import pytest

from nuguide import export
from nuguide.fanout import Outcome, Watch, name_results, parse_formats, read_summary, segment_files
from nuguide.image_run import ENDINGS, ImageJob
from nuguide.nuclei import Nuclei
from nuguide.types import UserError

ALL = list(ENDINGS)
COLUMNS = (
    "name,nuclei,nuclei_per_mm2,mean_area_um2,mean_probability,seconds,mpp,source,model,warnings,bytes,modified,files"
)
OTHERS = "is there already and not in summary.csv; choose another --out, or --overwrite it"


class Segment:
    """Finds dark squares, counts its calls, and fails on the calls that it is told to fail on."""

    def __init__(self, errors: dict[int, BaseException] | None = None):
        self.calls = 0
        self.errors = errors or {}

    def __call__(self, image: np.ndarray, mpp: float, tiles: Callable[[int, int], None]) -> Nuclei:
        self.calls += 1
        tiles(1, 2)
        if self.calls in self.errors:
            raise self.errors[self.calls]
        tiles(2, 2)
        dark = image[..., 0] < 100
        labels = cv2.connectedComponents(dark.view(np.uint8))[1].astype(np.uint32)
        return Nuclei.found(labels, image, dark * 0.9, mpp)


class Heard(Watch):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.images, self.shares, self.lines = 0, [], []

    def begin(self, images: int) -> None:
        self.images = images

    def tiles(self, done: int, total: int) -> None:
        self.shares.append((done, total))

    def end(self, line: str | None) -> None:
        self.lines.append(line)


def squares(path: Path, count: int = 2, mode: str = "RGB") -> Path:
    """An image file of 50 x 100 pixels with dark squares of 10 x 10 on pink."""
    image = np.full((50, 100, 3), (230, 180, 200), np.uint8)
    for number in range(count):
        image[20:30, 10 + 20 * number : 20 + 20 * number] = (60, 40, 120)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(image).convert(mode).save(path)
    return path


def run(inputs: list[Path], out: Path, segment: Segment | None = None, **options) -> Outcome:
    of_run = {name: options.pop(name) for name in ("overwrite", "watch", "at_once") if name in options}
    job = ImageJob(segment or Segment(), **{"model": "squares", "formats": ["csv"]} | options)
    return segment_files(inputs, out, lambda file: job, **of_run)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is written


@pytest.mark.parametrize("formats", [ALL, ["labels"], ["geojson", "csv"], ["overlay"]])
def test_exactly_the_wanted_files_are_written(tmp_path, formats):
    run([squares(tmp_path / "in" / "a.b.png")], tmp_path / "out", formats=formats)
    assert names(tmp_path / "out") == sorted(["summary.csv", *(f"a.b{ENDINGS[name]}" for name in formats)])


def test_the_summary_has_a_row_an_image_with_numbers_that_add_up(tmp_path):
    inputs = [squares(tmp_path / "one.png", 1), squares(tmp_path / "four.png", 4), squares(tmp_path / "none.png", 0)]
    outcome = run(inputs, tmp_path / "out", mpp=0.5)
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert ",".join(summary.columns) == COLUMNS
    assert summary["name"].tolist() == ["one", "four", "none"]
    assert summary["nuclei"].tolist() == [1, 4, 0]
    assert summary["nuclei_per_mm2"].tolist() == [800, 3200, 0]         # 50 x 100 px of 0.25 um2: 1250 um2
    assert summary["mean_area_um2"].tolist() == [25, 25, 0]             # 100 px
    assert summary["mean_probability"].tolist() == [0.9, 0.9, 0]
    assert summary["mpp"].tolist() == [0.5] * 3
    assert summary["source"].tolist() == [str(path.resolve()) for path in inputs]
    assert min(summary["seconds"]) >= 0
    assert (outcome.skipped, outcome.failed, len(outcome.rows)) == (0, [], 3)


def test_the_scale_is_what_the_user_says_else_the_file_else_the_default(tmp_path):
    known = tmp_path / "known.tif"
    squares(known)
    PIL.Image.open(known).save(known, dpi=(50_800, 50_800))             # 25400 / 50800 = 0.5 um
    files = [known, squares(tmp_path / "unknown.png")]
    heard = Heard()
    outcome = run(files, tmp_path / "out", watch=heard)
    assert [row.mpp for row in outcome.rows] == [0.5, 0.25]
    assert "0.5 microns per pixel, from the file" in heard.lines[0]
    assert "states no scale: 0.25 microns per pixel assumed (--mpp sets it)" in heard.lines[1]
    outcome = run(files, tmp_path / "stated", mpp=0.3, watch=(heard := Heard()))
    assert [row.mpp for row in outcome.rows] == [0.3, 0.3]
    assert not any("microns" in line for line in heard.lines)


def test_grey_transparent_and_palette_images_are_read_and_noted(tmp_path):
    files = [squares(tmp_path / f"{mode}.png", mode=mode) for mode in ("L", "RGBA", "P", "LA")]
    heard = Heard()
    outcome = run(files, tmp_path / "out", watch=heard)
    assert [row.nuclei for row in outcome.rows] == [2] * 4
    assert "the image is grey" in heard.lines[0]


def test_the_watch_hears_of_every_image_and_tile(tmp_path):
    heard = Heard()
    run([squares(tmp_path / f"{name}.png") for name in "abc"], tmp_path / "out", watch=heard)
    assert heard.images == len(heard.lines) == 3
    assert heard.shares == [(1, 2), (2, 2)] * 3
    assert heard.lines[0].startswith("a.png: 2 nuclei in ")


# Names


def test_the_same_stem_never_writes_over_another(tmp_path):
    inputs = [
        squares(tmp_path / "a" / "x.png", 1),
        squares(tmp_path / "b" / "x.png", 2),
        squares(tmp_path / "b" / "x.jpg", 3),
        squares(tmp_path / "c" / "X.png", 4),
        squares(tmp_path / "a" / "y.png", 5),
    ]
    outcome = run(inputs, tmp_path / "out")
    written = [row.name for row in outcome.rows]
    assert written == ["a_x", "b_x", "x_jpg", "c_X", "y"]
    for row, count in zip(outcome.rows, [1, 2, 3, 4, 5], strict=True):
        assert len(pd.read_csv(tmp_path / "out" / f"{row.name}.csv")) == row.nuclei == count
    assert len({name.casefold() for name in written}) == 5


def test_two_runs_never_write_over_each_other(tmp_path):
    out = tmp_path / "out"
    first = run([squares(tmp_path / "a" / "x.png", 1)], out)
    second = run([squares(tmp_path / "b" / "x.png", 2), squares(tmp_path / "c" / "X.jpg", 3)], out)
    assert [row.name for row in first.rows] == ["x"]
    assert [row.name for row in second.rows] == ["b_x", "c_X"]
    assert pd.read_csv(out / "summary.csv").set_index("name")["nuclei"].to_dict() == {"x": 1, "b_x": 2, "c_X": 3}
    assert [len(pd.read_csv(out / f"{name}.csv")) for name in ("x", "b_x", "c_X")] == [1, 2, 3]
    again = run([tmp_path / "a" / "x.png", tmp_path / "b" / "x.png"], out, segment := Segment(), overwrite=True)
    assert [row.name for row in again.rows] == ["x", "b_x"], "a file keeps its name"
    assert segment.calls == 2


def test_an_image_called_summary_does_not_write_over_the_summary(tmp_path):
    outcome = run([squares(tmp_path / "in" / "summary.png", 3)], tmp_path / "out")
    assert outcome.rows[0].name == "in_summary"
    assert names(tmp_path / "out") == ["in_summary.csv", "summary.csv"]


def test_names_are_found_for_any_number_of_files_alike(tmp_path):
    files = [tmp_path / str(number) / "same" / "x.png" for number in range(20)]
    given = name_results(files, {})
    assert len({name.casefold() for name in given}) == 20
    assert given[0] == "same_x"
    assert name_results(files, dict(zip(map(str, files), given, strict=True))) == given


def test_one_file_named_in_two_ways_is_done_once(tmp_path, monkeypatch):
    file = squares(tmp_path / "in" / "x.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    segment = Segment()
    outcome = run([file, Path("in/x.png"), Path("in"), Path("link"), Path("in/../in/x.png")], tmp_path / "out", segment)
    assert segment.calls == 1
    assert [row.name for row in outcome.rows] == ["x"]


def test_results_beside_the_images_are_not_taken_for_images(tmp_path):
    squares(tmp_path / "x.png")
    for _ in range(2):
        outcome = run([tmp_path], tmp_path, formats=ALL)
        assert [row.name for row in outcome.rows] == ["x"]
    assert outcome.skipped == 1


# Again, and on


def test_a_second_run_skips_what_is_finished(tmp_path):
    inputs = [squares(tmp_path / f"{name}.png") for name in "ab"]
    before = run(inputs, tmp_path / "out")
    segment, heard = Segment(), Heard()
    after = run([*inputs, squares(tmp_path / "c.png")], tmp_path / "out", segment, watch=heard)
    assert segment.calls == 1
    assert after.skipped == 2
    assert [row.name for row in after.rows] == ["a", "b", "c"]
    assert after.rows[0].seconds == pytest.approx(before.rows[0].seconds)
    assert heard.lines[:2] == [None, None]


def test_overwrite_does_it_again(tmp_path):
    file = squares(tmp_path / "a.png", 1)
    run([file], tmp_path / "out")
    squares(file, 3)
    outcome = run([file], tmp_path / "out", overwrite=True, model="other", mpp=0.5)
    assert outcome.skipped == 0
    assert len(pd.read_csv(tmp_path / "out" / "a.csv")) == 3
    row = pd.read_csv(tmp_path / "out" / "summary.csv").iloc[0]
    assert (row["nuclei"], row["model"], row["mpp"]) == (3, "other", 0.5)


@pytest.mark.parametrize("changed", [{"model": "other"}, {"mpp": 0.5}])
def test_results_of_another_model_or_scale_are_kept_and_the_user_told(tmp_path, changed):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out")
    before = (tmp_path / "out" / "a.csv").stat().st_mtime_ns
    outcome = run([file], tmp_path / "out", segment := Segment(), **changed)
    assert segment.calls == 0
    assert outcome.rows == []
    assert len(outcome.failed) == 1
    assert str(file) in outcome.failed[0]
    assert "made by squares at 0.25 microns per pixel; choose another --out, or --overwrite them" in outcome.failed[0]
    assert (tmp_path / "out" / "a.csv").stat().st_mtime_ns == before


def test_a_stated_scale_equal_to_the_one_used_is_no_change(tmp_path):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out", mpp=0.2521234)
    assert run([file], tmp_path / "out", mpp=0.2521234).skipped == 1


@pytest.mark.parametrize("gone", ENDINGS.values())
def test_a_result_file_that_is_missing_is_made_again(tmp_path, gone):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out", formats=ALL)
    (tmp_path / "out" / f"a{gone}").unlink()
    outcome = run([file], tmp_path / "out", segment := Segment(), formats=ALL)
    assert (segment.calls, outcome.skipped) == (1, 0)
    assert (tmp_path / "out" / f"a{gone}").is_file()


def test_a_format_asked_for_later_is_made(tmp_path):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out", formats=["csv"])
    assert run([file], tmp_path / "out", formats=["csv", "labels"]).skipped == 0
    assert run([file], tmp_path / "out", formats=["csv"]).skipped == 1


def test_formats_of_one_row_come_from_one_model(tmp_path):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out", formats=["csv"])
    outcome = run([file], tmp_path / "out", segment := Segment(), formats=["geojson"], model="other")
    assert "made by squares" in outcome.failed[0]
    assert segment.calls == 0
    assert names(tmp_path / "out") == ["a.csv", "summary.csv"]

    run([file], tmp_path / "out", formats=["geojson"], model="other", overwrite=True)
    outcome = run([file], tmp_path / "out", formats=["csv", "geojson"], model="other")
    assert "a.csv: is there already and not in summary.csv" in outcome.failed[0]          # it is of the model before


def test_a_format_asked_for_later_replaces_no_file_of_others(tmp_path):
    file = squares(tmp_path / "in" / "a.png")
    run([file], tmp_path / "out", formats=["csv"])
    own = tmp_path / "out" / "a.geojson"
    own.write_text("drawn by hand")
    outcome = run([file], tmp_path / "out", formats=["csv", "geojson"])
    assert outcome.failed == [f"{own}: {OTHERS}"]
    assert own.read_text() == "drawn by hand"
    assert run([file], tmp_path / "out", formats=["csv"]).skipped == 1


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyboardInterrupt()])
def test_a_run_that_was_cut_goes_on(tmp_path, error):
    inputs = [squares(tmp_path / f"{name}.png") for name in "abcd"]
    with pytest.raises(type(error)):
        run(inputs, tmp_path / "out", Segment({3: error}))
    assert names(tmp_path / "out") == ["a.csv", "b.csv", "summary.csv"]
    outcome = run(inputs, tmp_path / "out", segment := Segment())
    assert segment.calls == 2
    assert outcome.skipped == 2
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["name"].tolist() == list("abcd")


def test_a_run_that_was_cut_while_writing_leaves_no_half_and_goes_on(tmp_path, monkeypatch):
    file = squares(tmp_path / "a.png")

    def pull_the_plug(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(export.tifffile, "imwrite", pull_the_plug)
        with pytest.raises(KeyboardInterrupt):
            run([file], tmp_path / "out", formats=["csv", "labels"])
    assert names(tmp_path / "out") == [".a.begun", "a.csv"]                      # so a.csv is known as ours
    assert run([file], tmp_path / "out", segment := Segment(), formats=["csv", "labels"]).skipped == 0
    assert segment.calls == 1
    assert names(tmp_path / "out") == ["a.csv", "a.labels.tif", "summary.csv"]


def test_files_that_are_not_ours_are_not_replaced_unless_asked_to(tmp_path):
    file = squares(tmp_path / "in" / "a.png")
    own = tmp_path / "out" / "a.csv"
    own.parent.mkdir()
    own.write_text("drawn by hand")
    outcome = run([file], tmp_path / "out", segment := Segment(), formats=["geojson", "csv"])
    assert outcome.failed == [f"{own}: {OTHERS}"]
    assert (own.read_text(), segment.calls, names(tmp_path / "out")) == ("drawn by hand", 0, ["a.csv"])
    assert not run([file], tmp_path / "out", formats=["geojson", "csv"], overwrite=True).failed
    assert own.read_text() != "drawn by hand"


def test_two_runs_do_not_write_into_one_folder_at_a_time(tmp_path):
    file, other = squares(tmp_path / "a.png"), squares(tmp_path / "b.png")
    told = []

    class Meanwhile(Segment):
        def __call__(self, *given) -> Nuclei:
            with pytest.raises(UserError, match="out: another run is writing here; wait for it, or choose another"):
                run([other], tmp_path / "out")
            told.append(1)
            return super().__call__(*given)

    run([file], tmp_path / "out", Meanwhile())
    assert told
    assert names(tmp_path / "out") == ["a.csv", "summary.csv"]
    assert not run([other], tmp_path / "out").failed
    assert pd.read_csv(tmp_path / "out" / "summary.csv")["name"].tolist() == ["a", "b"]


def test_a_cut_overwrite_leaves_nothing_that_counts_as_finished(tmp_path):
    files = [squares(tmp_path / f"{name}.png") for name in "ab"]
    run(files, tmp_path / "out", model="old")
    with pytest.raises(KeyboardInterrupt):
        run(files, tmp_path / "out", Segment({2: KeyboardInterrupt()}), model="new", overwrite=True)
    assert pd.read_csv(tmp_path / "out" / "summary.csv")[["name", "model"]].to_numpy().tolist() == [["a", "new"]]
    outcome = run(files, tmp_path / "out", segment := Segment(), model="new")
    assert (outcome.skipped, segment.calls, outcome.failed) == (1, 1, [])


def test_an_image_that_was_changed_since_is_not_taken_for_finished(tmp_path):
    file = squares(tmp_path / "a.png", 1)
    run([file], tmp_path / "out")
    assert run([file], tmp_path / "out").skipped == 1
    squares(file, 4)
    (line,) = run([file], tmp_path / "out").failed
    assert line.startswith(f"{file}: was changed after {tmp_path / 'out' / 'a'}.* were made; choose another --out")
    assert run([file], tmp_path / "out", overwrite=True).rows[0].nuclei == 4
    rows = pd.read_csv(tmp_path / "out" / "summary.csv").drop(columns=["bytes", "modified", "files"])
    rows.to_csv(tmp_path / "out" / "summary.csv", index=False)              # as an older version wrote it
    assert run([file], tmp_path / "out").skipped == 1


def test_memory_that_opencv_lacks_costs_one_image(tmp_path):
    files = [squares(tmp_path / f"{name}.png") for name in "ab"]
    short = cv2.error("Insufficient memory")
    short.code = cv2.Error.StsNoMem
    outcome = run(files, tmp_path / "out", Segment({1: short}))
    assert outcome.failed == [f"{files[0]}: does not fit into memory; cut it into smaller images, or lower --batch"]
    assert [row.name for row in outcome.rows] == ["b"]
    odd = cv2.error("a bug")
    odd.code = cv2.Error.StsAssert
    with pytest.raises(cv2.error):
        run(files, tmp_path / "out", Segment({1: odd}), overwrite=True)


def test_a_link_that_leads_nowhere_is_told_of(tmp_path):
    squares(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "in" / "c.png").mkdir()
    outcome = run([tmp_path / "in"], tmp_path / "out")
    assert [row.name for row in outcome.rows] == ["a"]
    assert len(outcome.failed) == 1
    assert "gone.png" in outcome.failed[0] or "b.png" in outcome.failed[0]


# What goes wrong


def test_a_bad_file_is_reported_and_the_rest_goes_on(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    heard = Heard()
    files = [squares(tmp_path / "a.png"), bad, tmp_path / "missing.png", squares(tmp_path / "c.png")]
    outcome = run(files, tmp_path / "out", watch=heard)
    assert [row.name for row in outcome.rows] == ["a", "c"]
    assert [line.split(":")[0] for line in outcome.failed] == [str(tmp_path / "missing.png"), str(bad)]
    assert names(tmp_path / "out") == ["a.csv", "c.csv", "summary.csv"]
    assert heard.images == 3
    assert heard.lines[1] == f"failed: {outcome.failed[1]}"


def test_an_image_too_large_for_memory_is_reported_and_the_rest_goes_on(tmp_path):
    files = [squares(tmp_path / f"{name}.png") for name in "ab"]
    outcome = run(files, tmp_path / "out", Segment({1: MemoryError()}))
    assert [row.name for row in outcome.rows] == ["b"]
    assert outcome.failed == [f"{files[0]}: does not fit into memory; cut it into smaller images, or lower --batch"]


def test_a_name_that_is_no_text_is_refused(tmp_path):
    try:
        file = squares(tmp_path / os.fsdecode(b"gew\xe4be.png"))
    except OSError:
        pytest.skip("this disk takes no such names")
    outcome = run([file, squares(tmp_path / "b.png")], tmp_path / "out")
    assert [row.name for row in outcome.rows] == ["b"]
    assert len(outcome.failed) == 1
    assert "no valid text; rename the file" in outcome.failed[0]
    assert outcome.failed[0].isprintable()


def test_odd_names_are_kept_exactly(tmp_path):
    given = ["with, comma", 'quote"s', "007", "nan", "ünïcode µm", "two  spaces.v1.2", "-dash", "no\u00a0break"]
    files = [squares(tmp_path / "in" / f"{name}.png") for name in given]
    assert not run(files, tmp_path / "out").failed
    outcome = run(files, tmp_path / "out")
    assert outcome.skipped == len(given)
    assert [row.name for row in outcome.rows] == given


def test_a_full_disk_is_reported_and_leaves_no_half_written_file(tmp_path, monkeypatch):
    files = [squares(tmp_path / f"{name}.png") for name in "ab"]
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "a.geojson":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(export.os, "replace", full)
    outcome = run(files, tmp_path / "out", formats=["geojson", "csv"])
    said = "not written (No space left on device); free some space or write elsewhere"
    assert outcome.failed == [f"{tmp_path / 'out' / 'a.geojson'}: {said}"]
    assert [row.name for row in outcome.rows] == ["b"]
    assert names(tmp_path / "out") == [".a.begun", "a.csv", "b.csv", "b.geojson", "summary.csv"]   # a.csv is whole
    monkeypatch.undo()
    assert run(files, tmp_path / "out", formats=["geojson", "csv"]).skipped == 1             # and a is done again


@pytest.mark.parametrize("cut", [KeyboardInterrupt, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_cut_while_a_format_is_added_forgets_none_of_those_before(tmp_path, monkeypatch, cut):
    file, out = squares(tmp_path / "a.png"), tmp_path / "out"
    run([file], out, formats=["csv"])
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(target).name == "a.geojson":
            raise cut
        replace(source, target)

    with monkeypatch.context() as context, suppress(KeyboardInterrupt):
        context.setattr(export.os, "replace", fails)
        run([file], out, formats=["geojson"])
    assert run([file], out, formats=["csv"]).skipped == 1
    assert run([file], out, formats=["csv", "geojson"]).skipped == 0
    assert names(out) == ["a.csv", "a.geojson", "summary.csv"]
    assert run([file], out, formats=["csv", "geojson"]).skipped == 1


def test_a_summary_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name == "summary.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    file = squares(tmp_path / "a.png")
    with monkeypatch.context() as context:
        context.setattr(export.os, "replace", full)
        outcome = run([file], tmp_path / "out")
    assert outcome.rows == []
    assert "summary.csv: not written (No space left on device); free some space" in outcome.failed[0]
    assert run([file], tmp_path / "out").skipped == 0


def test_an_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("here already")
    with pytest.raises(UserError, match=r"out: no folder can be made here \(File exists\); choose another --out"):
        run([squares(tmp_path / "a.png")], tmp_path / "out")


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", COLUMNS + "\nx,two,0,0,0,0,0.25,/x.png,m,\n", COLUMNS + "\nx\n", "\xff\xfe\x00", '"']
)
def test_a_summary_that_is_not_ours_is_left_alone(tmp_path, content):
    summary = tmp_path / "out" / "summary.csv"
    summary.parent.mkdir()
    summary.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"summary\.csv: is no summary of ours; move it away or choose another --out"):
        run([squares(tmp_path / "a.png")], tmp_path / "out")
    assert summary.read_text(encoding="latin-1") == content


def test_a_folder_without_summary_has_no_rows(tmp_path):
    assert read_summary(tmp_path / "summary.csv") == {}


# Formats


def test_formats_are_named_with_commas():
    assert parse_formats("labels,geojson,csv,overlay", ENDINGS) == tuple(ALL)
    assert parse_formats(" csv , labels,csv,", ENDINGS) == ("csv", "labels")


@pytest.mark.parametrize("text", ["nonsense", "csv,png", "", ","])
def test_unknown_formats_are_refused_with_the_choices(text):
    with pytest.raises(UserError, match="--formats .*choose one or more of labels,geojson,csv,overlay"):
        parse_formats(text, ENDINGS)


@pytest.mark.parametrize("column", ["warnings", "files"])
def test_a_summary_from_before_a_column_was_there_goes_on(tmp_path, column):
    file = squares(tmp_path / "a.png")
    run([file], tmp_path / "out", mpp=0.5)
    summary = tmp_path / "out" / "summary.csv"
    pd.read_csv(summary).drop(columns=column).to_csv(summary, index=False)
    assert run([file], tmp_path / "out", mpp=0.5).skipped == 1
