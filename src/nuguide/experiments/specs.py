"""What is compared: arms, and the experiments that they make up, with the figures that the papers print.

The printed figures (Swain 2024, MICCAI and JMIS) come from other splits and a convention that follows pixel accuracy;
tables show them in a column of their own, and nothing is compared with them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from ..recipe import TrainOptions
from ..types import UserError

SETS = ("cryonuseg", "nuinsseg", "conic")

# Adam 1e-4, batch 16, 50 epochs, 256 px at 0.5 microns per pixel, Dice + focal: as printed; no schedule is
PAPER = TrainOptions(
    width=32, batch=16, epochs=50, lr=1e-4, weight_decay=1e-5, schedule="constant", patch_px=256, latent_dropout=0.0,
    normalize_stain="macenko", guide="efficientnet_lite0",
)


@dataclass(frozen=True)
class Arm:
    """One way to train, under a name that is also its folder.

    Attributes:
        title: for people. options: what it changes of an experiment's `TrainOptions`.
        guided: whether the experiment's guide comes in; `options` may name another one.
    """

    name: str
    title: str
    options: dict = field(default_factory=dict)
    guided: bool = False

    def recipe(self, base: TrainOptions, guide: str) -> TrainOptions:
        """The options of its training; network options are merged, all others replaced."""
        changes = dict(self.options)
        changes["network_options"] = base.network_options | changes.get("network_options", {})
        chosen = {"fusion": "x_gfb", "guide": guide} if self.guided else {"fusion": "none"}
        return dataclasses.replace(base, **(chosen | changes))


@dataclass(frozen=True)
class Experiment:
    """A table: its arms, the one that the others are compared with, and what the papers print.

    Attributes:
        printed: arm -> set -> (Dice, mIoU or None).
    """

    name: str
    title: str
    arms: tuple[Arm, ...]
    reference: str
    printed: dict[str, dict[str, tuple[float, float | None]]]

    def arm(self, name: str) -> Arm:
        """An arm by name; UserError lists the choices."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise UserError(f"{self.name} has no arm {name}; choose from {', '.join(arm.name for arm in self.arms)}")


def _printed(rows: dict[str, tuple]) -> dict[str, dict[str, tuple[float, float | None]]]:
    """Rows of one value or one pair for each of `SETS`."""
    return {
        arm: {name: cell if isinstance(cell, tuple) else (cell, None) for name, cell in zip(SETS, cells, strict=True)}
        for arm, cells in rows.items()
    }


def _activation(name: str, activation: str, title: str, **options) -> Arm:
    return Arm(name, title, {"network": "eunet3plus", "network_options": {"activation": activation, **options}})


UNGUIDED = Arm("eunet3plus", "eU-Net3+", {"network": "eunet3plus"})
GUIDED = Arm("x_gfb", "eU-Net3+ guided, X-GFB", {"network": "eunet3plus"}, guided=True)


def _fusion(name: str, title: str, **options) -> Arm:
    return Arm(name, title, {"network": "eunet3plus", "fusion": name.partition("_")[0], **options}, guided=True)


def _guide(name: str, title: str, **options) -> Arm:
    return Arm(f"x_gfb_{name}", title, {"network": "eunet3plus", "guide": name} | options, guided=True)


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            "table1",
            "Networks",
            (
                Arm("unet", "U-Net", {"network": "unet"}),
                Arm("ddunet", "DDU-Net", {"network": "ddunet"}),
                Arm("awgunet", "AWGUNet", {"network": "awgunet"}),
                Arm("unet3plus", "U-Net3+", {"network": "unet3plus"}),
                UNGUIDED,
                GUIDED,
            ),
            "eunet3plus",
            _printed({
                "unet": ((0.7371, 0.610), (0.797, 0.6781), (0.7353, 0.6214)),
                "ddunet": ((0.8143, 0.6822), (0.7154, 0.6133), (0.827, 0.7347)),
                "unet3plus": ((0.778, 0.6432), (0.7844, 0.7261), (0.8474, 0.7992)),
                "eunet3plus": ((0.8401, 0.7644), (0.8307, 0.8163), (0.8966, 0.8539)),
                "x_gfb": ((0.8942, 0.8164), (0.9399, 0.8938), (0.9351, 0.8869)),
            }),
        ),
        Experiment(
            "table2",
            "Activation of the encoder, unguided",
            (
                _activation("relu", "relu", "ReLU"),
                _activation("leaky_relu", "leaky_relu", "LeakyReLU"),
                _activation("silu", "silu", "Swish"),
                UNGUIDED,
                _activation("glu_matched", "glu", "GLU, as many weights as ReLU", match_width=True),
            ),
            "relu",
            _printed({
                "relu": (0.778, 0.7844, 0.8474),
                "leaky_relu": (0.7931, 0.8012, 0.8567),
                "silu": (0.7583, 0.7721, 0.8439),
                "eunet3plus": (0.8401, 0.8307, 0.8966),
            }),
        ),
        Experiment(
            "table3",
            "Fusion of the guide",
            (
                UNGUIDED,
                _fusion("concat", "guided, concatenated"),
                _fusion("concat_pyramid", "guided, concatenated at three levels", guide="efficientnet_lite0_pyramid"),
                GUIDED,
                _fusion("efb", "guided, EFB"),
                _fusion("cross", "guided, cross-attention (ours)"),
                Arm(
                    "x_gfb_all", "guided, X-GFB and gates at every level",
                    {"network": "eunet3plus", "levels": "all"}, guided=True,
                ),
                _fusion("cross_random", "guided, cross-attention, guide of random weights", guide_weights="random:0"),
                _fusion("concat_random", "guided, concatenated, guide of random weights", guide_weights="random:0"),
                _fusion(
                    "concat_pyramid_random", "guided, concatenated at three levels, guide of random weights",
                    guide="efficientnet_lite0_pyramid", guide_weights="random:0",
                ),
            ),
            "eunet3plus",
            _printed({
                "eunet3plus": (0.8401, 0.8307, 0.8966),
                "concat": (0.8235, 0.8146, 0.8918),
                "x_gfb": (0.8942, 0.9399, 0.9351),
            }),
        ),
        Experiment(
            "table4",
            "Frozen guide",
            (
                _guide("sam_vit_b", "SAM ViT-B"),
                _guide("sam_vit_b_region", "SAM ViT-B, one pass a region", guide="sam_vit_b", guide_scale="region"),
                _guide("sam_vit_l", "SAM ViT-L"),
                _guide("sam_vit_h", "SAM ViT-H"),
                _guide("mobile_sam", "MobileSAM"),
                _guide("medsam", "MedSAM"),
                _guide("pathosam", "PathoSAM"),
                _guide("dinov2_small", "DINOv2 ViT-S/14"),
                _guide("dinov2_base", "DINOv2 ViT-B/14"),
                _guide("efficientnet_lite0", "EfficientNet-Lite0"),
            ),
            "x_gfb_efficientnet_lite0",
            _printed({
                "x_gfb_sam_vit_b": (0.8942, 0.9399, 0.9351),
                "x_gfb_sam_vit_l": (0.8745, 0.8918, 0.9072),
                "x_gfb_sam_vit_h": (0.8731, 0.8867, 0.8917),
            }),
        ),
    )
}


def experiment(name: str) -> Experiment:
    """An experiment by name; UserError lists the choices."""
    if name not in EXPERIMENTS:
        raise UserError(f"there is no experiment {name}; choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
