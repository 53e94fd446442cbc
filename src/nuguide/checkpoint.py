"""A model on disk: `model.safetensors`, `config.json` that rebuilds it, and a card for people."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import confidence
from .fusion import LEVELS, FinerGuidance, Guided, build_fusion, feature_shapes, level_gates
from .guides import GUIDES, FrozenGuide, load_guide
from .instances import CHANNELS, Separation
from .networks import build_network
from .normalize import StainNormalizer
from .types import UserError
from .zoo import ALIASES, CONFIG, MODELS, WEIGHTS


@dataclass(frozen=True)
class ModelSpec:
    """Everything that rebuilds a model, and where it comes from.

    Attributes:
        network, network_options: a name of `NETWORKS` and its arguments.
        fusion, fusion_options: a name of `FUSIONS`, or None for a network without a guide. latent_dropout: of `Guided`.
        levels: one of `LEVELS`: where the guide comes in.
        guide, guide_weights, guide_px: a name of `GUIDES`, the id of its weights, and the side in pixels to which a
            tile is resized for it (None: as it is). guide_scale: of `FrozenGuide`.
        mpp: microns per pixel the network works at. exposure: whether images are brought to one exposure first.
        stain: of `normalize.StainNormalizer`, measured over the training images; empty where they stayed as they were.
        tile_px: side of the tiles it was trained on.
        separation: arguments of `instances.Separation`, chosen on validation images.
        confidence: of `confidence.fit` on validation images; empty where it was not fitted, and the probability of a
            nucleus is then the mean of its map.
        int8_ranges: of the inputs of its convolutions, for `networks.int8`; empty where they were not measured.
        origin: training data, licenses, recipe, scores, code version; facts for people, read by no code.
    """

    network: str
    network_options: dict = field(default_factory=dict)
    fusion: str | None = None
    fusion_options: dict = field(default_factory=dict)
    latent_dropout: float = 0.0
    levels: str = "bottleneck"
    guide: str | None = None
    guide_weights: str | None = None
    guide_px: int | None = None
    guide_scale: str = "tile"
    mpp: float = 0.5
    exposure: bool = False
    stain: dict = field(default_factory=dict)
    tile_px: int = 256
    separation: dict[str, float] = field(default_factory=dict)
    confidence: dict[str, float] = field(default_factory=dict)
    int8_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    origin: dict = field(default_factory=dict)


def build(spec: ModelSpec, guide_channels: int | None = None) -> nn.Module:
    """The network of a spec with fresh weights: `Guided`, or a plain network where the spec names no fusion."""
    network = build_network(spec.network, len(CHANNELS), **spec.network_options)
    if spec.fusion is None:
        return network
    if guide_channels is None:
        raise ValueError("a guided network needs the channels of its guide's latent")
    finer = None
    if spec.guide is not None and GUIDES[spec.guide].finer:
        about = GUIDES[spec.guide]
        channels, strides = zip(*feature_shapes(network), strict=True)
        finer = FinerGuidance(strides, channels, about.finer, about.stride)
        guide_channels -= sum(finer.sizes)
    fusion = build_fusion(spec.fusion, network.bottleneck_channels, guide_channels, **spec.fusion_options)
    if spec.levels not in LEVELS:
        raise ValueError(f"unknown levels {spec.levels!r}; choose from {', '.join(LEVELS)}")
    gates = level_gates(network, guide_channels) if spec.levels == "all" else []
    return Guided(network, fusion, spec.latent_dropout, gates, finer)


def save(folder: Path, model: nn.Module, spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model folder; an existing one is replaced only once the new one is complete.

    Floating-point tensors are stored as `dtype`; buffers that the code recomputes are not stored. Other files in the
    folder, such as a card, stay.

    Raises:
        UserError: the folder cannot be written; what stood there still does.
    """
    state = {name: stored(value, dtype) for name, value in model.state_dict().items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    new, old = made / "new", made / "old"
    try:
        if folder.is_dir():
            shutil.copytree(folder, new, ignore=shutil.ignore_patterns(WEIGHTS, CONFIG))
        new.mkdir(exist_ok=True)
        save_file(state, new / WEIGHTS)
        (new / WEIGHTS).chmod(0o644)                    # safetensors leaves it to its owner alone
        (new / CONFIG).write_text(json.dumps(dataclasses.asdict(spec), indent=1) + "\n")
        exchange(folder, new, old)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be written ({error}); free some space or choose another folder") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor as it is written: as `dtype` if it holds fractions and all of them stay finite."""
    value = value.detach().cpu().contiguous()
    if not value.is_floating_point():
        return value
    small = value.to(dtype)
    return small if bool(small.isfinite().all()) or not bool(value.isfinite().all()) else value


def exchange(folder: Path, new: Path, old: Path) -> None:
    """Put `new` where `folder` is, if it is anywhere, and that to `old`; a failure puts it back."""
    there = folder.is_dir()
    if there:
        os.replace(folder, old)
    try:
        os.replace(new, folder)
    except OSError:
        if there:
            os.replace(old, folder)
        raise


def model_folder(name: str | Path) -> Path:
    """The folder of a model given by name (of those that come with the package) or by path."""
    path = MODELS / ALIASES.get(str(name), str(name))
    if not (path / CONFIG).is_file():
        path = Path(name)
    if path.is_file() and path.name in {WEIGHTS, CONFIG}:
        path = path.parent
    if path.is_file():
        raise UserError(
            f"{path}: not a nuguide model; give a folder with {WEIGHTS} and {CONFIG} (pickled checkpoints are not "
            "loaded, since loading one can run its code)"
        )
    if not path.is_dir():
        names = "".join(f"{config.parent.name}, " for config in sorted(MODELS.glob(f"*/{CONFIG}")))
        raise UserError(f"{name}: no such model; give {names and names + 'or '}a folder with {WEIGHTS} and {CONFIG}")
    for file in (WEIGHTS, CONFIG):
        if not (path / file).is_file():
            raise UserError(f"{path}: not a nuguide model, {file} is missing; give a folder that nuguide train wrote")
    return path


def read_spec(folder: Path) -> ModelSpec:
    """The spec in a model folder; raises UserError where it is no valid one."""
    try:
        spec = ModelSpec(**json.loads((folder / CONFIG).read_text()))
        confidence.checked(spec.confidence)             # refused here, not at the first image
        if spec.stain:
            StainNormalizer.from_dict(spec.stain)
        numbers = {"mpp": spec.mpp, "tile_px": spec.tile_px, **vars(Separation(**spec.separation))}
        for name, value in numbers.items():
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} is {value!r}, no positive number")
        return spec
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{folder / CONFIG}: not a model description ({error}); train the model again") from error


def load(name: str | Path, guide: FrozenGuide | None = None) -> tuple[nn.Module, FrozenGuide | None, ModelSpec]:
    """(model in evaluation mode with fp32 weights, its frozen guide or None, spec).

    Args:
        guide: the model's guide where it is loaded already, such as from a file outside the cache.

    Raises UserError where the model is missing, broken, or not made for its description.
    """
    folder = model_folder(name)
    spec = read_spec(folder)
    if spec.guide is None:
        guide = None
    else:
        named = str(spec.guide_weights)
        weights = named.replace("-", ":", 1) if named.startswith("random-") else None
        try:
            guide = guide or load_guide(spec.guide, weights, spec.guide_px, spec.guide_scale)
        except ValueError as error:
            raise UserError(f"{folder / CONFIG}: not a model description ({error}); train the model again") from error
        if spec.guide_weights not in (None, guide.weights_id):
            raise UserError(
                f"{folder}: was trained with other weights of guide {spec.guide} ({spec.guide_weights}) than those "
                f"found ({guide.weights_id}); put the weights it was trained with into the cache"
            )
    try:
        model = build(spec, None if guide is None else guide.channels)
        model.load_state_dict(_fp32(load_file(folder / WEIGHTS)))
    except (SafetensorError, ValueError, TypeError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder / WEIGHTS}: cannot be loaded ({reason}); train or copy the model again") from error
    return model.eval(), guide, spec


def mean(model: nn.Module, folder: Path) -> nn.Module:
    """A copy of a model with the mean of its weights and of those in a model folder; running means of batch norm too.

    Two models of one training, apart in time but of one start, have a mean that is often better than either (Wortsman
    et al., Model soups, ICML 2022); so have a model and what it became on harder images (Wortsman et al., Robust
    fine-tuning of zero-shot models, CVPR 2022).
    """
    joined, others = copy.deepcopy(model), _fp32(load_file(folder / WEIGHTS))
    own = joined.state_dict()
    halves = {name: (value + others[name].to(value)) / 2 for name, value in own.items() if value.is_floating_point()}
    joined.load_state_dict(own | halves)
    return joined


def _fp32(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
