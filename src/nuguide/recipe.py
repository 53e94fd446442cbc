"""How a model is trained, as data: the command line's options, a run's `options.json`, and what `fit` takes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .augment import Augmentation
from .types import UserError


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
        mpp: microns per pixel to train at. exposure: bring every image to one exposure first (`stain.exposed`).
            patch_px: side of a training patch.
        epochs, steps_per_epoch: length; an epoch is `steps_per_epoch` batches, or one pass over the images.
        batch, lr, weight_decay, schedule: AdamW (Adam where weight_decay is 0) with a warm-up over the first 5% and
            a "cosine" fall to 1% of lr, or "constant".
        balance: 0 draws every image alike, 1 every group alike.
        seed: of the initial weights, the patches and drop-out.
        precision: auto, fp32 or bf16 (autocast). device: auto, cpu or cuda.
    """

    network: str = "eunet3plus"
    width: int = 16
    network_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    fusion: str = "cross"
    fusion_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    latent_dropout: float = 0.2
    guide: str = "efficientnet_lite0"
    guide_weights: str | None = None
    guide_px: int | None = None
    latents: str = "live"
    mpp: float = 0.5
    exposure: bool = False
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
