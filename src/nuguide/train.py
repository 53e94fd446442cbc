"""Training: the Lightning module, its files, and `fit`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from .batches import Batch, resized
from .calibrate import calibrate
from .callbacks import HardExamples, KeepModel, WeightAverage
from .datasets import Dataset
from .guides import CELLS_PX, FrozenGuide
from .latents import RegionLatents
from .loaders import Held, loaders, pictures_of, semantic_only, training_pictures, worker_count
from .losses import dice_focal, focal_loss
from .machine import choose_device, choose_precision, keep_freed_memory
from .metrics import dice
from .networks.blocks import cropped, pad_to_stride
from .recipe import TrainOptions
from .start import built, with_guide
from .together import leads, mean_of_all, place
from .types import UserError

RESUME = "last.ckpt"

# What Lightning tells every user of it, and why it is no news here; warnings about the training itself still show.
EXPECTED = {
    r"Checkpoint directory .* exists and is not empty": "OUT holds the other files of the run",
    r".*isinstance\(treespec, LeafSpec\).* is deprecated": "Lightning's own use of torch",
    r".*does not have many workers": "--workers decides; on a CPU all cores are at work anyway",
    r"GPU available but not used": "the user said --device cpu",
}


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


def fit(
    train: Sequence[Dataset],
    val: Sequence[Dataset],
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = True,
    progress: bool = True,
    devices: int = 1,
    nodes: int = 1,
    workers: int | None = None,
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
        workers: see `loaders.worker_count`; they change nothing of the result.
    Raises:
        UserError: OUT holds a run with other options or cannot be written, a data set is empty, an option names
            something that there is not, or the loss ceases to be finite.
    """
    options = with_guide(options or TrainOptions())
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
    loader, held = loaders(
        pictures, unseen, out, guide, options, processes, worker_count(workers, options, device, devices)
    )
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
