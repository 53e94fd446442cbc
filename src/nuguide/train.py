"""Training: the Lightning module, its files, and `fit`."""

from __future__ import annotations

import contextlib
import copy
import csv
import dataclasses
import json
import logging
import math
import os
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import checkpoint
from .batches import Batch, Patches, Picture, collate, picture, resized
from .calibrate import calibrate
from .callbacks import HardExamples, WeightAverage
from .checkpoint import ModelSpec
from .datasets import Dataset
from .fusion import Guided
from .guides import CELLS_PX, FrozenGuide, load_guide
from .latents import LatentCache, RegionLatents
from .losses import dice_focal, focal_loss
from .machine import choose_device, choose_precision, keep_freed_memory
from .metrics import dice
from .networks import fold_batch_norm
from .networks.blocks import cropped, pad_to_stride
from .networks.unet3plus import UNet3Plus
from .normalize import StainNormalizer
from .recipe import TrainOptions
from .resample import resampled_size, resize_image
from .together import Share, Stretch, leads, mean_of_all, place
from .types import UserError
from .widen import widen
from .zoo import trained_on

RESUME = "last.ckpt"
LATENTS_MAX_BYTES = 8 * 2**30

# What Lightning tells every user of it, and why it is no news here; warnings about the training itself still show.
EXPECTED = {
    r"Checkpoint directory .* exists and is not empty": "OUT holds the other files of the run",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated": "Lightning's own use of torch",
    r".*does not have many workers": "patches are drawn in this process, where the guide and the cache are",
    r"GPU available but not used": "the user said --device cpu",
}


class Held(NamedTuple):
    """A validation image (1, 3, H, W) float32, its labels (H, W) and what to ignore; its share of its data set."""

    image: Tensor
    labels: np.ndarray
    ignore: np.ndarray | None
    share: float


class Training(lightning.LightningModule):
    """One training run: the model, its loss, its optimizer, its validation by nucleus Dice, each data set alike."""

    def __init__(self, model: nn.Module, guide: nn.Module | None, options: TrainOptions):
        super().__init__()
        self.model = model
        self.frozen = [guide]            # in a list, so that its weights stay out of checkpoints
        self.options = options
        self.dice_and_share: list[tuple[float, float]] = []

    def forward(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Logits of images (B, 3, H, W); the guide is run where no latent is given."""
        image = image.contiguous(memory_format=torch.channels_last)
        guide = self.frozen[0]
        if guide is None:
            return self.model(image)
        if latent is None and isinstance(guide, FrozenGuide) and guide.scale == "region":
            return self.by_regions(image, guide)
        if latent is None:
            with torch.no_grad():
                latent = guide(image)
        return self.model(image, latent)

    def by_regions(self, image: Tensor, guide: FrozenGuide) -> Tensor:
        """Logits of one image (1, 3, H, W) of any size, its guide run region by region."""
        whole = pad_to_stride(image, CELLS_PX)
        shape = (whole.shape[-2], whole.shape[-1])
        with torch.no_grad():
            known = RegionLatents(shape, guide, lambda region: guide(whole[..., *region.window])[0])
            latent = known.part(0, 0, *shape)[None]
        return cropped(self.model(whole, latent), *image.shape[-2:])

    def on_fit_start(self) -> None:
        if self.frozen[0] is not None:
            self.frozen[0].to(self.device)

    def training_step(self, batch: Batch, _index: int) -> dict[str, Tensor]:
        """The loss and, where hard pictures are to be drawn more often, what each patch brings to it."""
        # drop-out's draws depend on the seed and the step alone, so a resumed run equals an unbroken one
        number, count = place()
        torch.manual_seed((self.options.seed * 1_000_003 + self.global_step) * count + number)
        logits = self(*seen(batch, self.frozen[0]))
        heads = logits if isinstance(logits, list) else [logits]
        shares = [0.5**level for level in range(len(heads))]        # the coarser a level, the less its loss counts
        losses = [
            share * dice_focal(head, batch.target, batch.weight) for share, head in zip(shares, heads, strict=True)
        ]
        loss = torch.stack(losses).sum() / sum(shares)
        size = len(batch.image)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=count > 1)
        if not self.options.hard:
            return {"loss": loss}
        patches = zip(heads[0].detach().float(), batch.target, strict=True)
        return {"loss": loss, "each": torch.stack([focal_loss(patch, target) for patch, target in patches])}

    def validation_step(self, batch: Held, _index: int) -> None:
        found = self(batch.image).float()[0, 0] > 0
        score = dice(batch.labels, found.cpu().numpy().astype(np.uint8), batch.ignore)
        self.dice_and_share.append((score, batch.share))

    def on_validation_epoch_end(self) -> None:
        shared = place()[1] > 1
        self.log("val_dice", mean_of_all(self.dice_and_share, self.device), prog_bar=True, sync_dist=shared)
        self.dice_and_share.clear()

    def configure_optimizers(self) -> Any:
        o = self.options
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            warm = max(total // 20, 1)
            if step < warm:
                return (step + 1) / warm
            if o.schedule == "constant":
                return 1.0
            return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def seen(batch: Batch, guide: nn.Module | None) -> tuple[Tensor, Tensor | None]:
    """The patches of a batch and, where there is a guide, their latents, of the whole images where not cached."""
    size = batch.target.shape[-1]
    around = (batch.image.shape[-1] - size) // 2
    patches = batch.image[..., around : around + size, around : around + size]
    if guide is None or batch.latent is not None or not around:
        return patches, batch.latent
    with torch.no_grad():
        latent = guide(batch.image.contiguous(memory_format=torch.channels_last))
    stride = batch.image.shape[-1] // latent.shape[-1]
    cells = slice(around // stride, (around + size) // stride)
    return patches, latent[..., cells, cells]


class KeepModel(Callback):
    """Writes the model folder as `keep` of the options says; metrics and curves after every epoch.

    For the mean, the best model so far waits in a folder of its own, which the last epoch's is joined with.
    """

    def __init__(self, folder: Path, spec: ModelSpec, deep_supervision: bool = False, keep: str = "best"):
        self.folder, self.spec, self.deep_supervision, self.keep = folder, spec, deep_supervision, keep
        self.best = -1.0

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        score = float(trainer.callback_metrics["val_dice"])
        better, self.best = score > self.best, max(score, self.best)
        if not trainer.is_global_zero:
            return
        facts = {"val_dice_at_training_resolution": round(score, 4), "epoch": trainer.current_epoch}
        model = pl_module.model
        assert isinstance(model, nn.Module)
        kept = without_side_heads(model) if self.deep_supervision else model
        best = self.folder / ("best" if self.keep == "mean" else "model")
        if better or self.keep == "last":
            self._save(best, kept, facts)
        if self.keep == "mean" and trainer.current_epoch == (trainer.max_epochs or 0) - 1:
            origin = checkpoint.read_spec(best).origin
            self._save(self.folder / "model", checkpoint.mean(kept, best), facts | {"mean_with_epoch": origin["epoch"]})

    def _save(self, folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
        checkpoint.save(folder, model, dataclasses.replace(self.spec, origin=self.spec.origin | facts))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        scores = {name: float(trainer.callback_metrics[name]) for name in ("train_loss", "val_dice")}
        if not math.isfinite(scores["train_loss"]):
            raise UserError(f"{self.folder}: the loss is no longer finite; train anew with a lower lr or in fp32")
        if not trainer.is_global_zero:
            return
        note_epoch(self.folder / "metrics.csv", {"epoch": trainer.current_epoch, "step": trainer.global_step, **scores})
        draw_curves(self.folder / "metrics.csv", self.folder / "curves.png")


def without_side_heads(model: nn.Module) -> nn.Module:
    """A copy of a model without the heads that deep supervision alone needs."""
    model = copy.deepcopy(model)
    for part in model.modules():
        if isinstance(part, UNet3Plus):
            part.side_heads = nn.ModuleList()
    return model


def note_epoch(metrics: Path, row: dict[str, float]) -> None:
    """Add a row to the metrics; rows of this epoch and later ones, left by a run that was cut, go."""
    rows: list[dict] = []
    if metrics.is_file():
        with metrics.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["epoch"]) < row["epoch"]]
    written = metrics.with_suffix(".tmp")
    with written.open("w", newline="") as file:
        table = csv.DictWriter(file, list(row), extrasaction="ignore")
        table.writeheader()
        table.writerows([*rows, row])
    os.replace(written, metrics)


def draw_curves(metrics: Path, picture_path: Path) -> None:
    """Training loss and validation Dice over epochs, as a PNG."""
    import pandas as pd
    from matplotlib.figure import Figure

    table = pd.read_csv(metrics)
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), ("train_loss", "val_dice"), ("training loss", "validation Dice"), strict=True
    ):
        axes.plot(table["epoch"] + 1, table[column], marker=".")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=110)


def one_image(batch: list[tuple[Picture, float]]) -> Held:
    """A validation batch: one picture."""
    ((drawn, share),) = batch
    image = torch.from_numpy(drawn.image_rgb.copy()).permute(2, 0, 1)[None].float()
    return Held(image, drawn.labels, drawn.ignore, share)


def pictures_of(
    datasets: Sequence[Dataset], mpp: float, exposure: bool = False, stain: StainNormalizer | None = None
) -> list[Picture]:
    """All samples at one resolution, exposure and stain if asked; groups and ids carry the name of their data set."""
    return [
        dataclasses.replace(p, id=f"{dataset.name}/{p.id}", group=f"{dataset.name}/{p.group}")
        for dataset in datasets
        for p in (picture(sample, mpp, exposure, stain) for sample in dataset)
    ]


def fit(
    train: Sequence[Dataset],
    val: Sequence[Dataset],
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = True,
    progress: bool = True,
    devices: int = 1,
    nodes: int = 1,
) -> Path:
    """Train a model; returns the folder OUT/model of the epoch with the best validation Dice.

    OUT holds `model/` (safetensors, JSON), `metrics.csv`, TensorBoard logs, `curves.png`, `options.json`, and
    `last.ckpt`, from which a run that was cut continues exactly (epochs already done are not repeated).

    Args:
        train, val: annotated data sets; no image should stand in both.
        resume: continue OUT if it holds an unfinished run with the same options.
        devices, nodes: processes on each machine, and machines, that share every batch: one for a GPU each, or on CPUs.
            Those that this process does not find running it starts, by the command line that it was started with. Only
            the leading one (`together.leads`) writes and returns a calibrated model.
    Raises:
        UserError: OUT holds a run with other options or cannot be written, a data set is empty, an option names
            something that there is not, or the loss ceases to be finite.
    """
    options = options or TrainOptions()
    keep_freed_memory()
    cv2.setNumThreads(torch.get_num_threads())
    if not any(len(d) for d in train) or not any(len(d) for d in val):
        raise UserError("training needs at least one image to train on and one to validate on; see --val-fraction")
    device = choose_device(options.device)
    processes = devices * nodes
    check_shares(options, val, processes)
    options = dataclasses.replace(options, precision=settled_precision(out, options.precision, device, processes))
    lightning.seed_everything(options.seed, verbose=False)
    model, guide, spec, stain = built(options, train, val)
    semantic_only(options, train)
    last = prepare_folder(out, options, resume)
    pictures = training_pictures(train, options, stain)
    unseen = pictures_of(val, options.mpp, options.exposure, stain)
    loader, held = loaders(pictures, unseen, out, guide, options, processes)
    kept = [KeepModel(out, spec, options.deep_supervision, options.keep)]
    with lightning_quiet():
        callbacks = [*kept, *callbacks_of(options, loader.dataset)]
        trainer = trainer_for(options, out, device, callbacks, progress and leads(), devices, nodes)
        try:
            trainer.fit(
                Training(model, guide, options), loader, held, ckpt_path=last, weights_only=True if last else None
            )
        except OSError as error:
            raise UserError(f"{out}: the run was cut ({error}); repeat the command to go on from there") from error
    if not leads():
        return out / "model"
    if options.mpp_range is not None:
        pictures = [resized(drawn, options.mpp_range[0] / options.mpp) for drawn in pictures]
    return calibrate(out / "model", pictures, unseen, None if guide is None else guide.cpu())


def built(
    options: TrainOptions, train: Sequence[Dataset], val: Sequence[Dataset]
) -> tuple[nn.Module, FrozenGuide | None, ModelSpec, StainNormalizer | None]:
    """The model to train, its frozen guide, its spec, and the stain of the training images.

    Raises:
        UserError: the options fit no model, name something that there is not, or a start that does not fit.
    """
    guide = None
    try:
        if options.fusion != "none":
            guide = load_guide(options.guide, options.guide_weights, options.guide_px, options.guide_scale).eval()
            fold_batch_norm(guide)
        if guide is not None and guide.scale == "region" and options.patch_px > (guide.image_px or 0):
            raise ValueError(f"patch_px {options.patch_px} is more than the guide's region of {guide.image_px} px")
        stain = fitted_stain(options, train)
        spec = model_spec(options, guide, train, val, stain)
        sides = {"deep_supervision": True} if options.deep_supervision else {}
        trained = dataclasses.replace(spec, network_options=spec.network_options | sides)
        model = checkpoint.build(trained, None if guide is None else guide.channels)
        if options.start is not None:
            spec = started(model, spec, options.start, guide, val)
    except (ValueError, TypeError) as error:
        raise UserError(f"no model can be built with these options: {error}") from error
    return model.to(memory_format=torch.channels_last), guide, spec, stain  # pyright: ignore[reportCallIssue]


def callbacks_of(options: TrainOptions, patches: Any) -> list[Callback]:
    """What the options ask to happen during training; to come after what keeps the model."""
    average = [WeightAverage(options.ema)] if options.ema else []
    hard = [HardExamples(patches, options.batch, options.hard)] if options.hard else []
    return [*average, *hard]


def trainer_for(
    options: TrainOptions, out: Path, device: torch.device, callbacks: list[Callback], progress: bool, devices: int,
    nodes: int,
) -> lightning.Trainer:
    """Lightning's trainer, which writes to OUT."""
    last = ModelCheckpoint(
        out, filename="last", save_top_k=1, enable_version_counter=False, save_on_train_epoch_end=True
    )
    return lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        use_distributed_sampler=False,          # ours know their share of each batch
        sync_batchnorm=device.type == "cuda" and devices * nodes > 1,
        precision="bf16-mixed" if options.precision == "bf16" else "32-true",
        logger=TensorBoardLogger(out, name="tensorboard", version=""),
        callbacks=[*callbacks, last, *([TQDMProgressBar(refresh_rate=1)] if progress else [])],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=out,
    )


def semantic_only(options: TrainOptions, train: Sequence[Dataset]) -> set[str]:
    """The names of the data sets that teach the nucleus map alone; UserError where one is none, or all of them do."""
    names, there = set(options.semantic_only), {dataset.name for dataset in train}
    if unknown := sorted(names - there):
        raise UserError(f"--semantic-only {unknown[0]}: no such training data; choose from {', '.join(sorted(there))}")
    if names == there:
        raise UserError("--semantic-only names all training data, so nothing would teach to tell nuclei apart")
    return names


def training_pictures(
    train: Sequence[Dataset], options: TrainOptions, stain: StainNormalizer | None = None
) -> list[Picture]:
    """What patches are drawn from: all samples at the finest resolution that patches are shown at."""
    finest = options.mpp if options.mpp_range is None else options.mpp_range[0]
    names = semantic_only(options, train)
    return [
        dataclasses.replace(drawn, semantic_only=dataset.name in names)
        for dataset in train
        for drawn in pictures_of([dataset], finest, options.exposure, stain)
    ]


def loaders(
    train: list[Picture], val: list[Picture], out: Path, guide: FrozenGuide | None, options: TrainOptions,
    processes: int = 1,
) -> tuple[DataLoader, DataLoader]:
    """Batches to train on, drawn anew in every epoch, and whole images to validate on; of each this process's share.

    Of several data sets to validate on each counts alike, however many images it has.
    """
    cache = pool = None
    if guide is not None and options.latents == "cached":
        cache, pool = LatentCache(out / "latents", LATENTS_MAX_BYTES), options.patch_px // 16
    around = surroundings(guide, cache, options)
    factors = None if options.mpp_range is None else (options.mpp_range[0] / options.mpp_range[1], 1.0)
    patches = Patches(
        train,
        options.patch_px,
        options.augmentation,
        options.seed,
        options.balance,
        guide,
        cache,
        pool,
        around,
        factors,
        options.gap_weight,
    )
    sets = Counter(drawn.group.partition("/")[0] for drawn in val)
    held = [(drawn, 1 / sets[drawn.group.partition("/")[0]]) for drawn in val]
    steps = options.steps_per_epoch or math.ceil(len(train) / options.batch)
    return (
        DataLoader(
            patches, batch_size=options.batch // processes, sampler=Stretch(steps, options.batch), collate_fn=collate
        ),
        DataLoader(held, 1, sampler=Share(len(held)), collate_fn=one_image),  # pyright: ignore[reportArgumentType]
    )


def surroundings(guide: FrozenGuide | None, cache: LatentCache | None, options: TrainOptions) -> int:
    """How far beyond a patch, on every side, the guide sees at each step, in pixels."""
    if guide is None or cache is not None:
        return 0
    if guide.scale == "region":
        assert guide.image_px is not None
        return (guide.image_px - options.patch_px) // 2
    return 0 if guide.image_px is not None else options.context_px


@contextlib.contextmanager
def lightning_quiet() -> Iterator[None]:
    """Inside, Lightning's advertisements and `EXPECTED` warnings stay silent; all other warnings show."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            for message in EXPECTED:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fitted_stain(options: TrainOptions, train: Sequence[Dataset]) -> StainNormalizer | None:
    """The stain of the training images at the model's resolution, or None where it is to be left as it is."""
    if options.normalize_stain == "none":
        return None
    images = (
        resize_image(sample.image_rgb, resampled_size(sample.labels.shape, sample.mpp, options.mpp))  # pyright: ignore
        for part in train
        for sample in part
    )
    return StainNormalizer(options.normalize_stain).fit(images)


def model_spec(
    options: TrainOptions,
    guide: FrozenGuide | None,
    train: Sequence[Dataset],
    val: Sequence[Dataset],
    stain: StainNormalizer | None = None,
) -> ModelSpec:
    """The spec of the model that these options make, with where it comes from."""
    from . import __version__

    def facts(parts: Sequence[Dataset]) -> list[dict]:
        return [
            {"name": d.name, "license": d.license, "images": len(d), "groups": sorted(set(d.groups))} for d in parts
        ]

    return ModelSpec(
        network=options.network,
        network_options={"width": options.width, **options.network_options},
        fusion=None if guide is None else options.fusion,
        fusion_options=options.fusion_options if guide is not None else {},
        latent_dropout=options.latent_dropout if guide is not None else 0.0,
        levels=options.levels if guide is not None else "bottleneck",
        guide=None if guide is None else options.guide,
        guide_weights=None if guide is None else str(guide.weights_id),
        guide_px=options.guide_px,
        guide_scale="tile" if guide is None else options.guide_scale,
        mpp=options.mpp,
        exposure=options.exposure,
        stain={} if stain is None else stain.to_dict(),
        tile_px=options.patch_px,
        origin={
            "code": f"nuguide {__version__}, torch {torch.__version__}",
            "options": dataclasses.asdict(options),
            "trained_on": facts(train),
            "validated_on": facts(val),
        },
    )


def started(
    model: nn.Module, spec: ModelSpec, start: str, guide: FrozenGuide | None, val: Sequence[Dataset]
) -> ModelSpec:
    """Give a fresh model the weights of the model `start`; its spec, with where those come from.

    Raises:
        UserError: that model is of another kind, or was trained on a group that is to be validated on.
    """
    known, _, before = checkpoint.load(start, guide)
    kind = ("network", "network_options")
    if before.fusion is not None or spec.fusion is None:        # else a guide is added, and its fusion begins anew
        kind += ("fusion", "fusion_options", "levels", "guide", "guide_weights", "guide_scale")
    width = {"width": spec.network_options["width"]}            # may grow
    free = width | {name: value for name, value in spec.network_options.items() if name == "dropout"}   # has no weights
    kept = {name: value for name, value in before.network_options.items() if name != "dropout"}
    there = dataclasses.replace(before, network_options=kept | free)
    if other := [name for name in kind if getattr(there, name) != getattr(spec, name)]:
        told = ", ".join(f"{name} is {getattr(before, name)!r} there, {getattr(spec, name)!r} here" for name in other)
        raise UserError(f"{start}: no start for this training: {told}; train with the same")
    seen = {(part["name"], group) for part in trained_on(before.origin) for group in part["groups"]}
    if again := sorted({(d.name, group) for d in val for group in d.groups} & seen):
        names = ", ".join(f"{group} of {name}" for name, group in again[:4])
        raise UserError(f"{start}: was trained on {names}, so validating on it says nothing; hold out other groups")
    begin(model, known, before.network_options["width"], width["width"], start)
    known_of_it = ("trained_on", "options", "started_from")             # which goes back to the first start
    facts = {"model": start} | {name: before.origin[name] for name in known_of_it if name in before.origin}
    return dataclasses.replace(spec, origin=spec.origin | {"started_from": facts})


def begin(model: nn.Module, known: nn.Module, narrow: int, wide: int, start: str) -> None:
    """Give a model the weights of a known one, which may be narrower or lack a guide.

    What the known one has not, a fusion or heads of deep supervision, begins anew.
    """
    if isinstance(model, Guided) and not isinstance(known, Guided):
        model = model.network
    if narrow == wide:
        model.load_state_dict(model.state_dict() | known.state_dict())
        return
    try:
        widen(known, model)
    except ValueError as error:
        raise UserError(
            f"{start}: is {narrow} wide and cannot begin a training {wide} wide: {error}; train with the same width"
        ) from error


def check_shares(options: TrainOptions, val: Sequence[Dataset], processes: int) -> None:
    """UserError where so many processes cannot share the work."""
    if processes < 1:
        raise UserError(f"--devices and --nodes must be 1 or more; together they are {processes}")
    if processes == 1:
        return
    if options.batch % processes:
        raise UserError(
            f"--batch {options.batch} cannot be shared evenly by {processes} processes; choose a multiple of that"
        )
    if sum(map(len, val)) < processes:
        raise UserError(f"{processes} processes need as many images to validate on; use fewer, or see --val-fraction")
    if options.hard:
        raise UserError("--hard needs one process, which sees the loss of every patch; leave out --devices and --nodes")


def settled_precision(out: Path, name: str, device: torch.device, processes: int = 1) -> str:
    """fp32 or bf16: what the run in OUT uses, if `auto` continues one, else what this machine runs best.

    Several processes do not measure, for they might come to different answers: then it is bf16 on GPUs and fp32 else.
    """
    if name == "auto" and processes > 1:
        return "bf16" if device.type == "cuda" else "fp32"
    if name == "auto" and (out / RESUME).is_file():
        with contextlib.suppress(OSError, ValueError, KeyError):
            name = json.loads((out / "options.json").read_text())["precision"]
    return "bf16" if choose_precision(name, device) is torch.bfloat16 else "fp32"


def prepare_folder(out: Path, options: TrainOptions, resume: bool) -> Path | None:
    """Make OUT and note the options; the checkpoint to continue from, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "options.json"
        last = out / RESUME
        if last.is_file():
            if not resume:
                raise UserError(f"{out}: holds a run already; choose another folder, or leave resuming on")
            if not file.is_file() or not options.equal(json.loads(file.read_text())):
                raise UserError(f"{out}: holds a run with other options (options.json); choose another folder")
            torch.load(last, map_location="cpu", weights_only=True)
            return last
        if leads():
            file.write_text(json.dumps(options.noted(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{out / 'options.json'}: is damaged; remove {out} to begin the run anew") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{out / RESUME}: is damaged; remove it to begin the run anew") from error
    return None
