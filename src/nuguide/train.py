"""Training: `TrainOptions`, the Lightning module, `fit`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import checkpoint
from .augment import Augmentation
from .batches import Batch, Patches, Picture, Stretch, collate, picture
from .checkpoint import ModelSpec
from .datasets import Dataset
from .guides import load_guide
from .latents import LatentCache
from .losses import dice_focal
from .machine import choose_device, choose_precision, keep_freed_memory
from .metrics import dice
from .types import UserError

log = logging.getLogger(__name__)
RESUME = "last.ckpt"


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained. The defaults make the model that comes with the package.

    Attributes:
        network: a name of `NETWORKS`; width: channels of its finest level; network_options: its other arguments.
        fusion: a name of `FUSIONS`, or "none" for no guide; fusion_options: its arguments; latent_dropout: share of the
            latent's channels dropped while training.
        guide: a name of `GUIDES`; guide_weights: a file, or "random:SEED" for the control; guide_px: side to which a
            patch is resized for the guide (the guide's own where not given).
        latents: "live" lets the guide see each augmented patch; "cached" computes each latent once and varies
            patches only by quarter turns, flips and color (for guides too slow to run at every step).
        mpp: microns per pixel to train at. patch_px: side of a training patch.
        epochs, steps_per_epoch: length; an epoch is `steps_per_epoch` batches, or one pass over the images.
        batch, lr, weight_decay, schedule: AdamW (Adam where weight_decay is 0) with a warm-up over the first 5% and
            a "cosine" fall to 1% of lr, or "constant".
        balance: 0 draws every image alike, 1 every group alike.
        seed: of the initial weights, the patches and drop-out.
        precision: auto, fp32 or bf16 (autocast). device: auto, cpu or cuda.
    """

    network: str = "eunet3plus"
    width: int = 16
    network_options: dict[str, Any] = field(default_factory=dict)
    fusion: str = "cross"
    fusion_options: dict[str, Any] = field(default_factory=dict)
    latent_dropout: float = 0.2
    guide: str = "efficientnet_lite0"
    guide_weights: str | None = None
    guide_px: int | None = None
    latents: str = "live"
    mpp: float = 0.5
    patch_px: int = 256
    epochs: int = 20
    steps_per_epoch: int | None = None
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    balance: float = 0.5
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (("latents", self.latents, ("live", "cached")),
                                     ("schedule", self.schedule, ("cosine", "constant"))):
            if value not in choices:
                raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        for name in ("epochs", "batch", "patch_px", "lr", "mpp", "width"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")


class Training(lightning.LightningModule):
    """One training run: the model, its loss, its validation by mean nucleus Dice, its optimizer."""

    def __init__(self, model: nn.Module, guide: nn.Module | None, options: TrainOptions):
        super().__init__()
        self.model = model
        self.frozen = [guide]            # in a list, so that its weights stay out of checkpoints
        self.options = options
        self.dice_per_image: list[float] = []

    def forward(self, image: Tensor, latent: Tensor | None = None) -> Tensor:
        """Logits of images (B, 3, H, W); the guide is run where no latent is given."""
        image = image.contiguous(memory_format=torch.channels_last)
        guide = self.frozen[0]
        if guide is None:
            return self.model(image)
        if latent is None:
            with torch.no_grad():
                latent = guide(image)
        return self.model(image, latent)

    def on_fit_start(self) -> None:
        if self.frozen[0] is not None:
            self.frozen[0].to(self.device)

    def on_train_epoch_start(self) -> None:
        # drop-out's draws depend on the seed and the epoch alone, so a resumed run equals an unbroken one
        torch.manual_seed(self.options.seed * 100_003 + self.current_epoch)

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        logits = self(batch.image, batch.latent)
        heads = logits if isinstance(logits, list) else [logits]
        loss = torch.stack([dice_focal(head, batch.target) for head in heads]).mean()
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(batch.image))
        return loss

    def validation_step(self, batch: tuple[Tensor, np.ndarray], _index: int) -> None:
        image, labels = batch
        found = self(image).float()[0, 0] > 0
        self.dice_per_image.append(dice(labels, found.cpu().numpy().astype(np.uint8)))

    def on_validation_epoch_end(self) -> None:
        self.log("val_dice", float(np.mean(self.dice_per_image)), prog_bar=True)
        self.dice_per_image.clear()

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


class KeepBest(Callback):
    """Writes the model folder whenever validation Dice is the best so far, and the curves after every epoch."""

    def __init__(self, folder: Path, spec: ModelSpec):
        self.folder, self.spec = folder, spec
        self.best = -1.0

    def state_dict(self) -> dict[str, float]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        score = float(trainer.callback_metrics["val_dice"])
        if trainer.sanity_checking or score <= self.best:
            return
        self.best = score
        origin = self.spec.origin | {"val_dice_at_training_resolution": round(score, 4), "epoch": trainer.current_epoch}
        model = pl_module.model
        assert isinstance(model, nn.Module)
        checkpoint.save(self.folder / "model", model, dataclasses.replace(self.spec, origin=origin))

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for logger in trainer.loggers:
            logger.save()
        draw_curves(self.folder / "metrics.csv", self.folder / "curves.png")


def draw_curves(metrics: Path, picture_path: Path) -> None:
    """Training loss and validation Dice over epochs, as a PNG."""
    import pandas as pd
    from matplotlib.figure import Figure

    if not metrics.is_file():
        return
    table = pd.read_csv(metrics)
    figure = Figure(figsize=(8, 3), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2), ("train_loss", "val_dice"), ("training loss", "validation Dice"), strict=True
    ):
        if column in table:
            rows = table.dropna(subset=[column])
            axes.plot(rows["epoch"] + 1, rows[column], marker=".")
        axes.set(xlabel="epoch", title=title)
        axes.grid(alpha=0.3)
    figure.savefig(picture_path, dpi=110)


class RunFolderLogger(CSVLogger):
    """Lightning's CSV log, as OUT/metrics.csv; a resumed run appends."""

    @property
    def log_dir(self) -> str:
        return str(self.root_dir)


def one_image(batch: list[Picture]) -> tuple[Tensor, np.ndarray]:
    """A validation batch: image (1, 3, H, W) float32 and its labels (H, W)."""
    (drawn,) = batch
    return torch.from_numpy(drawn.image_rgb.copy()).permute(2, 0, 1)[None].float(), drawn.labels


def pictures_of(datasets: Sequence[Dataset], mpp: float) -> list[Picture]:
    """All samples at one resolution; groups and ids carry the name of their data set."""
    return [
        dataclasses.replace(p, id=f"{dataset.name}/{p.id}", group=f"{dataset.name}/{p.group}")
        for dataset in datasets
        for p in (picture(sample, mpp) for sample in dataset)
    ]


def fit(
    train: Sequence[Dataset],
    val: Sequence[Dataset],
    out: Path,
    options: TrainOptions | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Train a model; returns the folder OUT/model of the epoch with the best validation Dice.

    OUT holds `model/` (safetensors, JSON), `metrics.csv`, TensorBoard logs, `curves.png`, `options.json`, and
    `last.ckpt`, from which a run that was cut continues exactly (epochs already done are not repeated).

    Args:
        train, val: annotated data sets; no image should stand in both.
        resume: continue OUT if it holds an unfinished run with the same options.
    Raises:
        UserError: OUT holds a run with other options, or a data set is empty.
    """
    options = options or TrainOptions()
    keep_freed_memory()
    cv2.setNumThreads(torch.get_num_threads())
    if not any(len(d) for d in train) or not any(len(d) for d in val):
        raise UserError("training needs at least one image to train on and one to validate on; see --val-fraction")
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device)
    lightning.seed_everything(options.seed, verbose=False)
    guide = None
    if options.fusion != "none":
        guide = load_guide(options.guide, weights=options.guide_weights, image_px=options.guide_px)
    spec = model_spec(options, guide, train, val)
    model = checkpoint.build(spec, None if guide is None else guide.channels).to(memory_format=torch.channels_last)
    last = prepare_folder(out, options, resume)
    drawn = pictures_of(train, options.mpp)
    cache = LatentCache(out / "latents") if guide is not None and options.latents == "cached" else None
    pool = options.patch_px // 16 if cache is not None else None
    patches = Patches(
        drawn, options.patch_px, options.augmentation, options.seed, options.balance, guide, cache, pool
    )
    steps = options.steps_per_epoch or math.ceil(len(drawn) / options.batch)
    loader = DataLoader(
        patches, batch_size=options.batch, sampler=Stretch(steps * options.batch), collate_fn=collate
    )
    held = DataLoader(pictures_of(val, options.mpp), batch_size=1, collate_fn=one_image)  # pyright: ignore[reportArgumentType]
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if precision is torch.bfloat16 else "32-true",
        logger=[RunFolderLogger(out, name="", version=""), TensorBoardLogger(out, name="tensorboard", version="")],
        callbacks=[
            KeepBest(out, spec),
            ModelCheckpoint(out, filename="last", save_top_k=1, every_n_epochs=1, enable_version_counter=False),
            *([TQDMProgressBar(refresh_rate=1)] if progress else []),
        ],
        enable_progress_bar=progress,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        default_root_dir=out,
    )
    trainer.fit(
        Training(model, guide, options), loader, held, ckpt_path=last, weights_only=True if last else None
    )
    return out / "model"


def model_spec(
    options: TrainOptions, guide: nn.Module | None, train: Sequence[Dataset], val: Sequence[Dataset]
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
        guide=None if guide is None else options.guide,
        guide_weights=None if guide is None else str(guide.weights_id),
        guide_px=options.guide_px,
        mpp=options.mpp,
        tile_px=options.patch_px,
        origin={
            "code": f"nuguide {__version__}, torch {torch.__version__}",
            "options": dataclasses.asdict(options),
            "trained_on": facts(train),
            "validated_on": facts(val),
        },
    )


def prepare_folder(out: Path, options: TrainOptions, resume: bool) -> Path | None:
    """Make OUT and note the options; the checkpoint to continue from, or None."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        noted = json.dumps(dataclasses.asdict(options), indent=1) + "\n"
        file = out / "options.json"
        last = out / RESUME
        if last.is_file():
            if not resume:
                raise UserError(f"{out}: holds a run already; choose another folder, or leave resuming on")
            if file.read_text() != noted:
                raise UserError(f"{out}: holds a run with other options (options.json); choose another folder")
            return last
        file.write_text(noted)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    return None
