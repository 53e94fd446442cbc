"""The command line: COMMANDS, from names to functions. Functions parse nothing; they call the library and print."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from . import __version__
from .cli_data import DATA_COMMANDS, data, open_all
from .recipe import TrainOptions
from .types import UserError

if TYPE_CHECKING:
    import pandas as pd

    from .datasets import Dataset
    from .fanout import Job, Outcome
    from .slide_run import Engine, SlideOptions

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "fp32", "bf16", "int8"]
MOST_WARNED = 5                                       # files whose warnings are shown after a run


def segment(
    inputs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    out: Path,
    model: str = "default",
    mpp: float | None = None,
    formats: str | None = None,
    roi: str | None = None,
    tissue_mask: bool = True,
    skip_bad_tiles: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    engine: Literal["local", "dask"] = "local",
    scheduler: str | None = None,
    workers: int | None = None,
    treat_as: Literal["auto", "image", "slide"] = "auto",
    device: Device = "auto",
    precision: Precision = "auto",
    batch: int = 1,
    flips: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    min_probability: float = 0.0,
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """Find every nucleus in images and whole slides.

    Of an image: OUT/NAME.labels.tif (instance label map), NAME.geojson (QuPath detections), NAME.csv (one row a
    nucleus), NAME.overlay.png (outlines on the image). Of a slide: NAME.parquet (one row a nucleus), NAME.geojson,
    NAME.heatmap.png (nuclei per mm2), NAME.tissue.png (what was searched) and NAME.summary.json. OUT/summary.csv has a
    row for each, with warnings of what looks wrong: blur, pen marks, folds, magnification. What is finished already
    is skipped, and an unfinished slide goes on where it was, so a run that was cut can be started again. A bad file
    is reported and the rest goes on (exit code 1).

    Args:
        inputs: Image files (PNG, JPEG, TIFF, BMP; 8-bit RGB), slides (SVS, NDPI, MRXS, SCN, BIF, VMS, OME-TIFF,
            pyramidal TIFF, DICOM by one of its .dcm files), or folders of them.
        out: Folder for the results.
        model: Name of a model that comes with the package, or the folder of one that nuguide train wrote.
        mpp: Microns per pixel of the inputs: 0.25 for a 40x scan, 0.5 for 20x. Where not given, what the file says;
            where it says nothing, 0.25 with a note for an image, and an error for a slide.
        formats: Which files to write, separated by commas. Of images: labels, geojson, csv, overlay. Of slides:
            parquet, csv, geojson, geojson.gz, labels (pyramidal OME-TIFF), ome-zarr, ome-zarr-0.5, spatialdata,
            heatmap.
        roi: Only this part of a slide: x,y,w,h in pixels of its full resolution, or a GeoJSON file of annotations that
            QuPath exported.
        tissue_mask: Search the tissue of a slide only, not its glass.
        skip_bad_tiles: Go on where a slide cannot be read, and report the places.
        engine: Where slides are computed: in this process, or by the workers of a Dask cluster.
        scheduler: Address of a Dask scheduler, such as tcp://host:8786; without it dask starts workers here.
        workers: How many workers dask starts here; by default one for every two cores.
        treat_as: Auto takes scanner formats, pyramids and images of 64 megapixels or more as slides.
        device: Where to compute.
        precision: Of the network; auto takes what is fastest on this machine.
        batch: Tiles computed at once; more is faster on a GPU and needs more memory.
        flips: Average over the image and its three mirror images: a little more accurate, four times as slow.
            Tables and QuPath detections then tell how far the four agree on each nucleus, from 0 to 1.
        min_probability: Leave out nuclei that are less likely than this to be ones that an annotator would draw too.
        overwrite: Do finished images again, and replace files of the same names that are in the way.
    """
    from .fanout import parse_formats, segment_files
    from .image_run import ENDINGS
    from .slide_run import SlideOptions
    from .slides.writers import WRITERS

    if not inputs:
        raise UserError("nothing to segment; name image files, slides, or folders of them")
    if mpp is not None and not 0.05 <= mpp <= 5:
        raise UserError(f"--mpp {mpp}: must lie between 0.05 and 5; a 40x scan has about 0.25")
    if not 0 <= min_probability <= 1:
        raise UserError(f"--min-probability {min_probability}: must lie between 0 and 1")
    how = device, precision, batch, flips, min_probability
    options = SlideOptions(model, mpp, roi, tissue_mask, skip_bad_tiles, *how).anywhere()
    wanted = None if formats is None else parse_formats(formats, [*ENDINGS, *WRITERS])
    bar = Bar()
    with engine_for(engine, scheduler, workers) as (compute, threads, at_once):
        options = dataclasses.replace(options, threads=threads)
        job_for = jobs(options, out, wanted, treat_as, compute, overwrite)
        try:
            outcome = segment_files(inputs, out, job_for, overwrite, bar, at_once)
        finally:
            bar.close()
    return report(outcome, out)


def report(outcome: Outcome, out: Path) -> int:
    """Say what became of a run; its exit code."""
    from .fanout import SUMMARY

    total = sum(row.nuclei for row in outcome.rows)
    print(
        f"{total} nuclei in {len(outcome.rows)} images"
        + (f" ({outcome.skipped} finished before)" if outcome.skipped else "")
        + (f"; results in {out}, one row an image in {out / SUMMARY}" if outcome.rows else "")
    )
    odd = [row for row in outcome.rows if row.warnings]
    for row in odd[:MOST_WARNED]:
        print(f"look at {row.name}: {row.warnings}", file=sys.stderr)
    if len(odd) > MOST_WARNED:
        print(f"and {len(odd) - MOST_WARNED} more with warnings in {out / SUMMARY}", file=sys.stderr)
    for failure in outcome.failed:
        print(f"failed: {failure}", file=sys.stderr)
    if not outcome.failed:
        return 0
    return 1 if outcome.rows else 2


def jobs(
    options: SlideOptions, out: Path, wanted: Sequence[str] | None, treat_as: str, engine: Engine, overwrite: bool
) -> Callable[[Path], Job]:
    """What tells which job a file is for: an image's or a slide's; each writes the formats wanted that it has."""
    from .image_run import ENDINGS, ImageJob
    from .predict import DEFAULT_MPP
    from .slide_run import DEFAULT_FORMATS, MANIFEST, Manifest, SlideJob, predictor_for
    from .slides.reader import is_slide
    from .slides.writers import WRITERS

    of_images, of_slides = (
        usual if wanted is None else tuple(name for name in wanted if name in choices)
        for choices, usual in ((ENDINGS, tuple(ENDINGS)), (WRITERS, DEFAULT_FORMATS))
    )
    called = model_name(options.model) + (", flips" if options.flips else "")
    called += f", probability from {options.min_probability:g}" if options.min_probability else ""
    images = ImageJob(predictor_for(options).segment, called, options.mpp, DEFAULT_MPP, of_images)
    slides = SlideJob(options, called, of_slides, engine, Manifest(out / MANIFEST), overwrite)

    @functools.cache                                  # for a look into the file takes time
    def job_for(file: Path) -> Job:
        job = slides if treat_as == "slide" or (treat_as == "auto" and is_slide(file)) else images
        if not job.formats:
            asked = ",".join(wanted or ())
            raise UserError(f"{file}: none of --formats {asked} can be written of it; see nuguide segment --help")
        if options.roi is not None and job is images:
            raise UserError(f"{file}: --roi is for slides; leave it out, or give --treat-as slide")
        return job

    return job_for


@contextlib.contextmanager
def engine_for(engine: str, scheduler: str | None, workers: int | None) -> Iterator[tuple[Engine, int, int]]:
    """Where slides are computed, with how many threads a process (0: as many as there are), and how many at a time."""
    from .slide_run import Here

    if engine == "local" and (scheduler is not None or workers is not None):
        raise UserError("--scheduler and --workers are for --engine dask; name it too, or leave them out")
    if workers is not None and (scheduler or workers < 1):
        raise UserError(f"--workers {workers}: how many to start here, 1 or more; leave it out with --scheduler")
    if engine == "local":
        yield Here(), 0, 1
        return
    from .cluster import connected, threads_of

    with connected(scheduler, workers) as cluster:
        # two slides at a time: while one is written out by this process, the workers are at the next
        yield cluster, threads_of(scheduler, workers), 2


def model_name(model: str) -> str:
    """What a model is called in a summary: its name or absolute path, and the first digits of its weights' SHA-256."""
    from .checkpoint import MODELS, WEIGHTS, model_folder
    from .guides.weights import file_sha256

    folder = model_folder(model)
    called = folder.name if folder.parent == MODELS else folder.resolve()
    return f"{called} ({file_sha256(folder / WEIGHTS)[:8]})"


class Bar:
    """Progress of a run over files on the terminal, the parts of each counted in; files may be under way together."""

    def __init__(self) -> None:
        self.shares: dict[int, float] = {}            # of the file that each thread is at
        self.bar = None
        self.turn = threading.Lock()

    def begin(self, images: int) -> None:
        """Show a bar of this many images."""
        from tqdm import tqdm

        form = "{l_bar}{bar}| {n:.2f}/{total} images [{elapsed}<{remaining}]"
        self.bar = tqdm(total=images, bar_format=form)

    def tiles(self, done: int, total: int) -> None:
        """Move by the share of the file that this thread is at."""
        self._move(0.95 * done / max(total, 1))       # the rest is separating, measuring and writing

    def end(self, line: str | None) -> None:
        """Complete the file that this thread is at and print the line about it."""
        self._move(1.0)
        with self.turn:
            self.shares.pop(threading.get_ident(), None)
            if line and self.bar is not None:
                self.bar.write(line)

    def _move(self, share: float) -> None:
        with self.turn:
            assert self.bar is not None
            me = threading.get_ident()
            self.bar.update(share - self.shares.get(me, 0.0))
            self.shares[me] = share

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
    devices: int = 1,
    nodes: int = 1,
    workers: int | None = None,
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
        devices: Processes that share each batch on this machine, one for each GPU; on a CPU, one for each few cores.
        nodes: Machines that do, with the same command started on each by SLURM (srun) or torchrun, and one disk.
        workers: Processes that draw patches ahead, for each that trains. Where not given, none on a CPU, whose cores
            are at work anyway, and for a GPU as many as there are cores to spare, 8 at the most.
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
    from .together import leads

    if leads():
        note_split(out, training, validation)
        print(f"{sum(map(len, training))} images to train on, {sum(map(len, validation))} to validate on")
    try:
        folder = fit(training, validation, out, options, devices=devices, nodes=nodes, workers=workers)
    except SystemExit as error:                       # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from error
    if not leads():
        return 0
    print(f"model: {folder}\ncurves: {out / 'curves.png'}")
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
    min_probability: float = 0.0,
    by_group: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
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
        min_probability: Leave out nuclei that are less likely than this to be ones that an annotator would draw too.
        by_group: Intervals for which whole organs, patients or slides are drawn, not single images: images of one are
            alike. Of two or three such groups an interval says little.
    """
    import pandas as pd

    from .evaluate import evaluate as score_all
    from .evaluate import write_scores
    from .predict import load

    parts = open_all(data, annotator)
    if split is not None:
        parts = [validation_part(part, split) for part in parts]
    if by_group and (alone := [part.name for part in parts if len(set(part.groups)) < 2]):
        raise UserError(f"{', '.join(alone)}: all images are of one group; leave --by-group out")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"{out}: there is no such folder; make it first")
    tables = {}
    for name in filter(None, (model, against)):
        predictor = load(name, device=device, precision=precision, flips=flips, min_probability=min_probability)
        tables[name] = [score_all(predictor, part, scored(part, name)) for part in parts]
    for index, part in enumerate(parts):
        print_scores(part, {name: scores[index] for name, scores in tables.items()}, by_group)
    if out is not None:
        facts = {"code": f"nuguide {__version__}", "model": model, "data": list(data), "annotator": annotator,
                 "split": None if split is None else str(split), "precision": precision, "flips": flips,
                 "min_probability": min_probability}
        write_scores(out, pd.concat(tables[model], ignore_index=True), facts)
        print(f"\nscores of every image: {out}")
    return 0


def print_scores(part: Dataset, tables: Mapping[str, pd.DataFrame], by_group: bool) -> None:
    """Print what models scored on a data set, and of two what the first is above the second, image by image.

    Args:
        tables: by model, of `evaluate.evaluate`; one or two. by_group: as of `evaluate.interval`.
    """
    from .evaluate import paired, summarize

    count = f"{len(part)} images" + (f" of {len(set(part.groups))} groups, drawn whole" if by_group else "")
    for name, scores in tables.items():
        print(f"\n{part.name}, {count}, {name}:")
        print(summarize(scores, by_group=by_group).to_string(index=False, float_format="%.3f"))
    if len(tables) == 2:
        difference = paired(*tables.values(), by_group=by_group)
        print(f"\n{part.name}, {' minus '.join(tables)}, image by image:")
        print(difference.to_string(index=False, float_format="%+.3f"))


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


def models(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = None,
    /,
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> int:
    """List the models that come with the package: what they are, were trained on, and how they score.

    Args:
        name: One of them: print its card, which also says where it fails.
        json: Print what is known of them, or of the one named, as JSON.
    """
    from . import zoo

    listed = [zoo.find(one) for one in (zoo.names() if name is None else [name])]
    if json:
        facts = [model.facts() for model in listed]
        print(dumps(facts if name is None else facts[0], indent=1))
    else:
        print(zoo.listing(listed) if name is None else listed[0].card)
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "segment": segment, "train": train, "evaluate": evaluate, "data": data, "models": models
}
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
    for stream in (sys.stdout, sys.stderr):           # a name that the terminal cannot show must not end a batch
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
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
        same = "the same command without --overwrite" if "--overwrite" in arguments else "the same command"
        print(f"nuguide: stopped; {same} goes on where it was", file=sys.stderr)
        code = 130
    except BrokenPipeError:                           # whoever read the output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # nor may the last flush complain
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    main()
