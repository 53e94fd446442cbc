"""The command line: COMMANDS, from names to functions. Functions parse nothing; they call the library and print."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from . import __version__
from .cli_data import DATA_COMMANDS, data, open_all
from .recipe import TrainOptions
from .types import UserError

if TYPE_CHECKING:
    from .datasets import Dataset

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "int8"]


def segment(
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    out: Path,
    model: str = "default",
    mpp: float | None = None,
    formats: str = "labels,geojson,csv,overlay",
    device: Device = "auto",
    precision: Precision = "auto",
    batch: int = 1,
    flips: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Find every nucleus in images.

    Writes OUT/NAME.labels.tif (instance label map), NAME.geojson (QuPath detections), NAME.csv (one row a nucleus),
    NAME.overlay.png (outlines on the image) for every image, and OUT/summary.csv. Images that are finished already are
    skipped, so a run that was cut can be started again. A bad file is reported and the rest goes on (exit code 1).

    Args:
        inputs: Image files (PNG, JPEG, TIFF, BMP; 8-bit RGB) or folders of them.
        out: Folder for the results.
        model: Name of a model that comes with the package, or the folder of one that nuguide train wrote.
        mpp: Microns per pixel of the inputs: 0.25 for a 40x scan, 0.5 for 20x. Where not given, what the file says,
            else 0.25 with a note.
        formats: Which files to write, separated by commas.
        device: Where to compute.
        precision: Of the network; auto takes what is fastest on this machine.
        batch: Tiles computed at once; more is faster on a GPU and needs more memory.
        flips: Average over the image and its three mirror images: a little more accurate, four times as slow.
        overwrite: Do finished images again.
    """
    from .fanout import SUMMARY, parse_formats, segment_files
    from .predict import DEFAULT_MPP, load

    if not inputs:
        raise UserError("nothing to segment; name image files, or folders of them")
    wanted = parse_formats(formats)
    if mpp is not None and not 0.05 <= mpp <= 5:
        raise UserError(f"--mpp {mpp}: must lie between 0.05 and 5; a 40x scan has about 0.25")
    predictor = load(model, device=device, precision=precision, batch=batch, flips=flips)
    bar = Bar()
    try:
        outcome = segment_files(
            inputs,
            out,
            lambda image, image_mpp, tiles: predictor.segment(image, image_mpp, tiles),
            model=model_name(model) + (", flips" if flips else ""),
            mpp=mpp,
            default_mpp=DEFAULT_MPP,
            formats=wanted,
            overwrite=overwrite,
            watch=bar,
        )
    finally:
        bar.close()
    total = sum(row.nuclei for row in outcome.rows)
    print(
        f"{total} nuclei in {len(outcome.rows)} images"
        + (f" ({outcome.skipped} finished before)" if outcome.skipped else "")
        + (f"; results in {out}, one row an image in {out / SUMMARY}" if outcome.rows else "")
    )
    for failure in outcome.failed:
        print(f"failed: {failure}", file=sys.stderr)
    if not outcome.failed:
        return 0
    return 1 if outcome.rows else 2


def model_name(model: str) -> str:
    """What a model is called in a summary: its name or absolute path, and the first digits of its weights' SHA-256."""
    from .checkpoint import MODELS, WEIGHTS, model_folder
    from .guides.weights import file_sha256

    folder = model_folder(model)
    called = folder.name if folder.parent == MODELS else folder.resolve()
    return f"{called} ({file_sha256(folder / WEIGHTS)[:8]})"


class Bar:
    """Progress of a run over images on the terminal, each image's tiles counted in."""

    def __init__(self) -> None:
        self.share = 0.0
        self.bar = None

    def begin(self, images: int) -> None:
        """Show a bar of this many images."""
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n:.1f}/{total} images [{elapsed}<{remaining}]"
        self.bar = tqdm(total=images, bar_format=form)

    def tiles(self, done: int, total: int) -> None:
        """Move by the share of the present image."""
        assert self.bar is not None
        share = 0.95 * done / total                   # the rest is separating, measuring and writing
        self.bar.update(share - self.share)
        self.share = share

    def end(self, line: str | None) -> None:
        """Complete the present image and print the line about it."""
        assert self.bar is not None
        self.bar.update(1 - self.share)
        self.share = 0.0
        if line:
            self.bar.write(line)

    def close(self) -> None:
        """Leave the bar as it is and go on below it."""
        if self.bar is not None:
            self.bar.close()


def train(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    out: Path,
    options: Annotated[TrainOptions, tyro.conf.OmitArgPrefixes],
    val: tuple[str, ...] = (),
    val_fraction: float = 0.2,
    split_seed: int = 0,
) -> int:
    """Train a model on annotated images.

    Writes OUT/model (use it with --model OUT/model), OUT/metrics.csv and curves.png, TensorBoard logs, split.json with
    the images of each part, and last.ckpt: the same command again continues a run that was cut.

    Args:
        data: Annotated images: NAME=FOLDER, where NAME is folder, nuinsseg, tnbc, cryonuseg, monuseg, conic, dsb2018,
            pannuke, lizard, qupath or dsb_he, in their official layout or as images/ + labels/ + manifest.csv; or just
            the FOLDER of your own images/ and labels/ (instance maps) or masks/ (binary), paired by name.
        out: Folder for the run.
        options: How to train.
        val: Annotated images to validate on, like data. Where none are given, whole groups (patients, slides, organs)
            of the data are held out.
        val_fraction: Share of the images to hold out.
        split_seed: Draws the groups that are held out: of 200 draws, the one whose images are as crowded with nuclei
            as all images are.
    """
    from .datasets.splits import hold_out

    parts = open_all(data)
    if val:
        training, validation = parts, open_all(val)
    else:
        held = []
        for part in parts:
            try:
                crowded = [float((sample.labels > 0).mean()) for sample in part]
                held.append(hold_out(part.groups, val_fraction, split_seed, crowded))
            except ValueError as error:
                raise UserError(f"{part.name}: {error}; name images to validate on with --val") from error
        training = [part.subset(train) for part, (train, _) in zip(parts, held, strict=True)]
        validation = [part.subset(keep) for part, (_, keep) in zip(parts, held, strict=True)]
    try:
        from .train import fit
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}; install it with: pip install 'nuguide[train]'") from error
    note_split(out, training, validation)
    print(f"{sum(map(len, training))} images to train on, {sum(map(len, validation))} to validate on")
    try:
        folder = fit(training, validation, out, options)
    except SystemExit as error:                       # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    print(f"best model: {folder}\ncurves: {out / 'curves.png'}")
    print(f"use it: nuguide segment IMAGE --out DIR --model {folder}")
    return 0


def note_split(out: Path, training: Sequence[Dataset], validation: Sequence[Dataset]) -> None:
    """Write OUT/split.json; UserError where a picture stands in both parts, or OUT holds a run on other images."""
    from .datasets.splits import read_manifest, shared_content, write_manifest
    from .train import RESUME

    split, new = out / "split.json", out / "split.new.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        manifest = write_manifest(new, {"train": training, "val": validation})
        if twice := shared_content(manifest):
            names = ", ".join(sorted({member.id for group in twice for _, member in group})[:6])
            raise UserError(f"the same picture stands in both parts ({names}); remove it from one")
        run_is_there = split.is_file() and (out / RESUME).is_file()
        if run_is_there and read_manifest(split).sha256 != manifest.sha256:
            raise UserError(f"{split}: the run here was made with other images or parts; choose another --out")
        new.replace(split)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    finally:
        if out.is_dir():
            new.unlink(missing_ok=True)


def evaluate(
    data: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    model: str = "default",
    against: str | None = None,
    split: Path | None = None,
    annotator: str | None = None,
    out: Path | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
    flips: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Score a model on annotated images: Dice, AJI, PQ and more, each a mean over images with its 95% interval.

    Args:
        data: Annotated images, NAME=FOLDER or FOLDER, as for nuguide train.
        model: Name or folder of the model.
        against: A second model: the differences are taken image by image.
        split: A split.json that nuguide train wrote: score only the images that it lists for validation.
        annotator: Whose annotation of CryoNuSeg is the truth: annotator1, annotator1_round2 or annotator2.
        out: A JSON file for the scores of every image.
        device: Where to compute.
        precision: Of the network.
        flips: Average over each image and its three mirror images.
    """
    import pandas as pd

    from .evaluate import evaluate as score_all
    from .evaluate import paired, summarize, write_scores
    from .predict import load

    parts = open_all(data, annotator)
    if split is not None:
        parts = [validation_part(part, split) for part in parts]
    tables = {}
    for name in filter(None, (model, against)):
        predictor = load(name, device=device, precision=precision, flips=flips)
        tables[name] = [score_all(predictor, part, scored(part, name)) for part in parts]
    for index, part in enumerate(parts):
        for name, scores in tables.items():
            print(f"\n{part.name}, {len(part)} images, {name}:")
            print(summarize(scores[index]).to_string(index=False, float_format="%.3f"))
        if against is not None:
            difference = paired(tables[model][index], tables[against][index])
            print(f"\n{part.name}, {model} minus {against}, image by image:")
            print(difference.to_string(index=False, float_format="%+.3f"))
    if out is not None:
        facts = {"code": f"nuguide {__version__}", "model": model, "data": list(data), "annotator": annotator,
                 "split": None if split is None else str(split), "precision": precision, "flips": flips}
        write_scores(out, pd.concat(tables[model], ignore_index=True), facts)
        print(f"\nscores of every image: {out}")
    return 0


def scored(part: Dataset, model: str) -> Callable[[int], None]:
    """A progress bar over the images of a data set."""
    from tqdm import tqdm

    bar = tqdm(total=len(part), desc=f"{model} on {part.name}", unit="image", leave=False)

    def done(images: int) -> None:
        bar.update(images - bar.n)
        if images == len(part):
            bar.close()

    return done


def validation_part(part: Dataset, split: Path) -> Dataset:
    """The images of a data set that a split.json lists for validation."""
    from .datasets.splits import read_manifest

    listed = {(member.dataset, member.id) for member in read_manifest(split).parts.get("val", [])}
    kept = part.subset(i for i, id in enumerate(part.ids) if (part.name, id) in listed)
    if not len(kept):
        raise UserError(f"{split}: lists no image of {part.name} for validation; leave --split out, or give its data")
    return kept


COMMANDS: dict[str, Callable[..., int]] = {"segment": segment, "train": train, "evaluate": evaluate, "data": data}
DESCRIPTION = "Finds every nucleus in H&E histology. Start with: nuguide segment IMAGE --out DIR"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, 1 where only a part of a batch was sound or done, or 2 where nothing was."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments in (["--version"], ["-V"]):
        print(f"nuguide {__version__}")
        sys.exit(0)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # decoders also complain of damaged files themselves; a file gets one line, ours
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="PIL")
    try:
        if arguments[:1] == ["data"]:
            table, prog, said, arguments = DATA_COMMANDS, "nuguide data", data.__doc__, arguments[1:]
        else:
            table, prog, said = COMMANDS, "nuguide", DESCRIPTION
        code = tyro.extras.subcommand_cli_from_dict(table, prog=prog, description=said, args=arguments)
    except UserError as error:
        print(f"nuguide: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("nuguide: stopped; the same command goes on where it was", file=sys.stderr)
        code = 130
    except BrokenPipeError:                           # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # nor may the last flush complain
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    main()
