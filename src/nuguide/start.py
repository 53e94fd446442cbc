"""The model that a training begins with: fresh, or with the weights of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn

from . import checkpoint
from .checkpoint import ModelSpec
from .datasets import Dataset
from .fusion import Guided
from .guides import FrozenGuide, load_guide
from .networks import fold_batch_norm
from .normalize import StainNormalizer
from .recipe import TrainOptions
from .resample import resampled_size, resize_image
from .types import UserError
from .widen import widen
from .zoo import trained_on

GUIDE = "efficientnet_lite0_pyramid"      # embedded, and of those the one from which a network learns most in few steps


def with_guide(options: TrainOptions) -> TrainOptions:
    """The options with the name of the guide: as given, that of the model to start from, or the default one."""
    if options.guide is not None:
        return options
    there = None if options.start is None else checkpoint.read_spec(checkpoint.model_folder(options.start)).guide
    return dataclasses.replace(options, guide=there or GUIDE)


def built(
    options: TrainOptions, train: Sequence[Dataset], val: Sequence[Dataset]
) -> tuple[nn.Module, FrozenGuide | None, ModelSpec, StainNormalizer | None]:
    """The model to train, its frozen guide, its spec, and the stain of the training images.

    Raises:
        UserError: the options fit no model, name something that there is not, or a start that does not fit.
    """
    guide, options = None, with_guide(options)
    try:
        if options.fusion != "none":
            assert options.guide is not None
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
