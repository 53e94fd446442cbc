"""How a model is trained, as data: the command line's options, a run's `options.json`, and what `fit` takes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .augment import Augmentation
from .normalize import METHODS
from .types import UserError


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained. The card of the model that comes with the package names what it changed.

    Attributes:
        start: a model to begin with, by name or folder: training goes on from its weights, on other images or by
            another recipe. Network, fusion and guide must be as in that model, but that a guide may be added to one
            without. The width may be a multiple of its width: each channel begins as several (without a guide, or with
            the fusion cross or concat).
        network: unet, unet3plus, eunet3plus, ddunet, awgunet, asppunet, sharpunet or hovernet.
        width: channels of the network's finest level.
        network_options: other arguments of the network, as NAME VALUE pairs, such as activation silu.
        fusion: how the guide comes in: cross, concat, x_gfb, efb; none for no guide.
        fusion_options: other arguments of the fusion, as NAME VALUE pairs.
        levels: bottleneck fuses the guide with the deepest features alone; all lets it gate the finer ones as well.
        latent_dropout: share of the latent's channels that are dropped while training.
        guide: efficientnet_lite0, efficientnet_lite0_pyramid (whose features at strides 8 and 4 come in as well, each
            concatenated with the network's own of that stride), sam_vit_b, sam_vit_l, sam_vit_h, mobile_sam, medsam,
            pathosam, dinov2_small or dinov2_base. Where not given, that of `start`, and efficientnet_lite0_pyramid
            where that has none or there is no start.
        guide_weights: a file, or random:SEED for the control without knowledge; else the published ones.
        guide_px: side to which a patch is resized for the guide; the guide's own where not given.
        guide_scale: tile brings each patch to the guide's size, as in the papers; region lets the guide see the patch
            at the network's resolution within a square of guide_px, so one pass serves all tiles of a region.
        latents: live lets the guide see each augmented patch; cached computes each latent once and varies patches only
            by quarter turns, flips and color, for guides too slow to run at every step.
        mpp: microns per pixel to train at.
        mpp_range: least and greatest microns per pixel that patches are shown at, drawn evenly on a log scale, such as
            0.25 1.0, in place of augmentation.scale; for images that may come at any resolution.
        exposure: bring every image to one exposure first.
        normalize_stain: macenko, reinhard or vahadane brings every image to the stain of the training images, measured
            over them and kept in the model; none.
        patch_px: side of a training patch, in pixels at that resolution, a multiple of 32; of smaller patches the same
            time makes more steps.
        context_px: what a live guide sees around each patch, on every side; a multiple of 32. A guide that resizes
            what it sees gets the patch alone.
        epochs: after each one the model is validated.
        steps_per_epoch: batches in an epoch; where not given, one pass over the images.
        batch: patches in a batch.
        lr: highest learning rate of AdamW, reached after the first 5% of the steps.
        weight_decay: of AdamW; 0 makes it Adam.
        schedule: cosine lets the learning rate fall to 1%, constant keeps it.
        balance: 0 draws every image alike, 1 every group alike.
        hard: how strongly images of higher recent loss are drawn more often, from the second epoch on: in proportion to
            that loss to this power, between a quarter and four times as often; 0 for not at all.
        semantic_only: names of data sets whose nuclei are outlined but not told apart well: they teach the nucleus map
            alone, not the interior.
        gap_weight: how much the interior map counts in the gaps between close nuclei, against 1 elsewhere: more keeps
            more neighbors apart.
        deep_supervision: the coarser levels of unet3plus or eunet3plus learn to predict as well, each for half of what
            the next finer one counts; they have no part in the model that is kept.
        ema: decay of an average of the weights over the steps, which then is what is validated and kept, such as 0.999;
            0 keeps the weights as they are. At step t the decay is at most (1 + t) / (10 + t).
        keep: best keeps the model of the epoch with the highest validation Dice, last that of the last epoch, mean the
            mean of the weights of the two: with `start` and `ema` often better than either. Until the last epoch is
            done, the best one is then in a folder `best` beside where the model will be. halfway keeps the mean of the
            weights of `start`, in a folder `start` meanwhile, and of the last epoch: what training on harder patches
            gains, at less cost to what was known before.
        augmentation: how patches are varied.
        seed: of the initial weights, the patches and drop-out.
        precision: of training: auto, fp32 or bf16; auto takes bf16 where this machine is faster with it.
        device: auto, cpu or cuda.
    """

    start: str | None = None
    network: str = "eunet3plus"
    width: int = 16
    network_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    fusion: str = "concat"
    fusion_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    levels: str = "bottleneck"
    latent_dropout: float = 0.2
    guide: str | None = None
    guide_weights: str | None = None
    guide_px: int | None = None
    guide_scale: str = "tile"
    latents: str = "live"
    mpp: float = 0.5
    mpp_range: tuple[float, float] | None = None
    exposure: bool = False
    normalize_stain: str = "none"
    patch_px: int = 128
    context_px: int = 64
    epochs: int = 20
    steps_per_epoch: int | None = None
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    balance: float = 0.5
    hard: float = 0.0
    semantic_only: tuple[str, ...] = ()
    gap_weight: float = 1.0
    deep_supervision: bool = False
    ema: float = 0.0
    keep: str = "best"
    augmentation: Augmentation = field(default_factory=Augmentation)
    seed: int = 0
    precision: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value, choices in (("latents", self.latents, ("live", "cached")),
                                     ("guide_scale", self.guide_scale, ("tile", "region")),
                                     ("keep", self.keep, ("best", "last", "mean", "halfway")),
                                     ("schedule", self.schedule, ("cosine", "constant")),
                                     ("normalize_stain", self.normalize_stain, ("none", *METHODS))):
            if value not in choices:
                raise UserError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")
        for name in ("epochs", "batch", "patch_px", "lr", "mpp", "width"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("patch_px", "context_px"):         # the coarsest stride of networks and guides
            if getattr(self, name) < 0 or getattr(self, name) % 32:
                raise UserError(f"{name} must be a multiple of 32, not {getattr(self, name)}")
        if self.keep == "halfway" and self.start is None:
            raise UserError("keep halfway is half way from a model to start from; name one with --start")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be 0 or more and below 1, not {self.ema}")
        if not self.gap_weight > 0:
            raise UserError(f"gap_weight must be positive, not {self.gap_weight}")
        if not 0 <= self.hard <= 4:
            raise UserError(f"hard must lie between 0 and 4, not {self.hard}")
        if self.mpp_range is not None and not 0 < self.mpp_range[0] < self.mpp_range[1]:
            raise UserError(f"mpp_range must rise from above 0, not {self.mpp_range[0]} to {self.mpp_range[1]}")
        if self.mpp_range is not None and self.latents == "cached":
            raise UserError("mpp_range needs latents live: those in a cache are of one resolution")

    def noted(self) -> dict:
        """All options as plain JSON values."""
        return json.loads(json.dumps(asdict(self)))

    def equal(self, noted: dict) -> bool:
        """Whether options that were noted before, perhaps by a version that had fewer, are these.

        An option that was not there yet counts as its default.
        """
        defaults = TrainOptions().noted()
        augmentation = {**defaults["augmentation"], **noted.get("augmentation", {})}
        return {**defaults, **noted, "augmentation": augmentation} == self.noted()
