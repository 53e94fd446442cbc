"""`nuguide-experiments`: run the papers' tables, write them, draw the figures."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..types import UserError
from .specs import EXPERIMENTS, PAPER, SETS, Experiment, experiment

Name = Annotated[str, tyro.conf.Positional]


def run(
    table: Name,
    data_root: Path,
    out: Path = Path("runs/experiments"),
    sets: tuple[str, ...] = SETS,
    guide: str = "sam_vit_b",
    arms: tuple[str, ...] = (),
    folds: int = 5,
    split: Literal["grouped", "own"] = "grouped",
    only_folds: tuple[int, ...] = (),
    budget: float = 1.0,
    epochs: int | None = None,
    width: int = PAPER.width,
    batch: int = PAPER.batch,
    patch_px: int = PAPER.patch_px,
    lr: float = PAPER.lr,
    schedule: str = PAPER.schedule,
    normalize_stain: str = PAPER.normalize_stain,
    latents: str = PAPER.latents,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    workers: int | None = None,
) -> int:
    """Train and score every arm of a table on every fold; the same command again goes on where it was cut.

    Args:
        table: table1 (networks), table2 (activations), table3 (fusions) or table4 (guides).
        data_root: Folder that holds the sets under their names: cryonuseg/, nuinsseg/, conic/.
        out: Folder for runs and results.
        sets: Which sets.
        guide: Of the guided arms: sam_vit_b (the papers'), or efficientnet_lite0, which needs no download and no GPU.
        arms: Only these arms.
        folds: Folds, grouped by organ, patient or source.
        split: grouped folds, or own: of conic the 80/20 of its baseline, by source image; one fold. Give it with
            --sets conic.
        only_folds: Only these, counted from 0.
        budget: Factor on the steps of the papers' recipe (50 epochs).
        epochs: At the most: the same steps in fewer, longer epochs. After each the model is validated, which takes
            longer than a few steps where a set is small.
        width: Channels of the finest level.
        batch: Patches in a batch.
        patch_px: Side of a patch at 0.5 microns per pixel.
        lr: Learning rate.
        schedule: constant, as printed, or cosine.
        normalize_stain: macenko, reinhard, vahadane or none.
        latents: live, or cached: each latent is computed once, and the patches of guided arms vary less (quarter turns,
            flips and color alone), so their differences to unguided arms are no longer of the guide alone.
        seed: Of folds, weights and patches.
        device: auto, cpu or cuda.
        precision: Of training: auto, fp32 or bf16.
        workers: Processes that draw patches ahead; where not given, none on a CPU, and up to 8 for a GPU.
    """
    from .run import Plan, open_sets
    from .run import run as run_experiment

    chosen = experiment(table)
    base = dataclasses.replace(
        PAPER, width=width, batch=batch, patch_px=patch_px, lr=lr, schedule=schedule, normalize_stain=normalize_stain,
        latents=latents, seed=seed, device=device, precision=precision,
    )
    run_experiment(
        chosen, open_sets(data_root, sets), out,
        Plan(base, guide, folds, only_folds, arms, budget, split, epochs, workers),
        progress=sys.stderr.isatty(), said=lambda text: print(text, flush=True),
    )
    print(f"tables: nuguide-experiments tables --out {out}")
    return 0


def found(out: Path, names: Sequence[str]) -> dict[str, tuple[Experiment, object]]:
    """The experiments that have results, with their rows."""
    from .tables import results

    tables = {name: (experiment(name), results(out, experiment(name))) for name in names or EXPERIMENTS}
    tables = {name: pair for name, pair in tables.items() if len(pair[1])}
    if not tables:
        raise UserError(f"{out}: holds no results; make some with nuguide-experiments run")
    return tables  # pyright: ignore[reportReturnType]


def tables(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    out: Path = Path("runs/experiments"),
    to: Path | None = None,
    beside: Path | None = None,
) -> int:
    """Print the tables of all results as Markdown; with --to, write NAME.md and NAME.tex there.

    Args:
        names: Which tables; all that have results where none is named.
        out: Folder of the runs.
        to: Folder for the files.
        beside: Folder of what nuguide-experiments beside wrote; people and the classical method get rows, too.
    """
    from ..export import replacing
    from .tables import latex, markdown

    for name, (chosen, rows) in found(out, names).items():
        text = markdown(rows, chosen, beside)  # pyright: ignore[reportArgumentType]
        print(f"## {chosen.title}\n\n{text}\n")
        if to is not None:
            to.mkdir(parents=True, exist_ok=True)
            for ending, content in ((".md", text + "\n"), (".tex", latex(rows, chosen, beside))):  # pyright: ignore
                with replacing(to / f"{name}{ending}") as file:
                    file.write(content.encode())
    return 0


def figures(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    out: Path = Path("runs/experiments"),
    to: Path = Path("figures"),
    data_root: Path | None = None,
) -> int:
    """Draw bars, violins, paired differences and training curves of all results; with --data-root, panels of images.

    Args:
        names: Which tables; all that have results where none is named.
        out: Folder of the runs.
        to: Folder for the PNG files.
        data_root: Folder that holds the sets under their names.
    """
    from .figures import bars, draw_panels, forest, save, training_curves, violins
    from .tables import curves

    for name, (chosen, rows) in found(out, names).items():
        drawings: dict[str, Callable] = {"bars": bars, "violins": violins}
        if rows["arm"].nunique() > 1 and chosen.reference in set(rows["arm"]):  # pyright: ignore
            drawings["differences"] = forest
        for kind, draw in drawings.items():
            print(save(draw(rows, chosen), to / f"{name}.{kind}.png"))
        went = curves(out, chosen)
        if len(went):
            print(save(training_curves(went, chosen), to / f"{name}.curves.png"))
        if data_root is not None:
            panels = draw_panels(chosen, out, data_root, to)
            print(*panels or [f"{name}: no panels, for {chosen.reference} was not run on fold 0"], sep="\n")
    return 0


def beside(
    data_root: Path,
    out: Path,
    sets: tuple[str, ...] = ("cryonuseg",),
) -> int:
    """Score what stands beside the arms: the classical method on every image, and the other annotations of CryoNuSeg.

    Writes OUT/classical.SET.json and, for CryoNuSeg, annotator2.cryonuseg.json and annotator1_round2.cryonuseg.json.

    Args:
        data_root: Folder that holds the sets under their names.
        out: Folder for the scores of every image.
        sets: Which sets.
    """
    from .. import __version__
    from ..datasets import read_dataset
    from ..evaluate import summarize, write_scores
    from .beside import classical, people
    from .run import open_sets

    out.mkdir(parents=True, exist_ok=True)
    for name, dataset in open_sets(data_root, sets).items():
        found = {"classical": classical(dataset)}
        for other in ("annotator2", "annotator1_round2") if name == "cryonuseg" else ():
            found[other] = people(dataset, read_dataset(name, data_root / name, annotator=other))
        for who, scores in found.items():
            facts = {"code": f"nuguide {__version__}", "what": f"{who} against the first annotation of {name}"}
            write_scores(out / f"{who}.{name}.json", scores, facts)
            print(f"\n{name}, {len(scores)} images, {who}:")
            print(summarize(scores).to_string(index=False, float_format="%.3f"))
    return 0


def encodings(
    images: Annotated[tuple[Path, ...], tyro.conf.Positional],
    to: Path = Path("figures/encodings.png"),
    guides: tuple[str, ...] = ("efficientnet_lite0",),
) -> int:
    """Draw three principal components of what guides say of images.

    Args:
        images: Image files.
        to: The PNG file to write.
        guides: Names of guides: efficientnet_lite0, efficientnet_lite0_pyramid, sam_vit_b, sam_vit_l, sam_vit_h,
            mobile_sam, medsam, pathosam, dinov2_small, dinov2_base.
    """
    from ..guides import load_guide
    from ..images import read_image
    from .figures import encodings as draw
    from .figures import save

    if not images:
        raise UserError("no image; name at least one")
    print(save(draw({name: load_guide(name) for name in guides},
                    {path.stem: read_image(path).image_rgb for path in images}), to))
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "run": run, "tables": tables, "figures": figures, "beside": beside, "encodings": encodings,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, or 2 where the user can put something right."""
    try:
        code = tyro.extras.subcommand_cli_from_dict(COMMANDS, args=arguments, prog="nuguide-experiments")
    except (UserError, ValueError) as error:
        print(f"nuguide-experiments: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        print(f"nuguide-experiments: {error.filename or 'a file'}: {error.strerror or error}; choose another folder",
              file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("stopped; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code)
