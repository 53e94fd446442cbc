"""The models that come with the package: what they are, what they were trained on and how they score, without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .types import UserError

MODELS = Path(__file__).parent / "models"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
CARD, SCORES = "README.md", "scores.json"
ALIASES = {"default": "small"}           # the model that commands use where none is named
METRICS = {"dice": "Dice", "aji": "AJI", "pq": "PQ"}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")        # stored, but not trained


@dataclass(frozen=True)
class Shipped:
    """A model that comes with the package.

    Attributes:
        name, aliases: what it can be loaded by.
        network, width, fusion, guide: as in `checkpoint.ModelSpec`; fusion and guide are None without a guide.
        mpp: microns per pixel it works at.
        parameters: of the network; the guide's are not among them. bytes, sha256: of the file of its weights.
        trained_on: {"name", "license", "images"} of each data set, those of the model it started from too.
        scores: evaluation set -> {"title", "images", and of each of `METRICS` [mean, low, high]}, the 95% interval of
            the mean over images.
        folder: where it is.
    """

    name: str
    aliases: tuple[str, ...]
    network: str
    width: int | None
    fusion: str | None
    guide: str | None
    mpp: float
    parameters: int
    bytes: int
    sha256: str
    trained_on: tuple[dict[str, Any], ...]
    scores: dict[str, dict[str, Any]]
    folder: Path

    @property
    def card(self) -> str:
        """Its card as Markdown, without the marks of generated tables."""
        return re.sub(r"<!-- .*? -->\n", "", (self.folder / CARD).read_text())

    def facts(self) -> dict[str, Any]:
        """All of it for machines; what JSON can hold."""
        return {**vars(self), "folder": str(self.folder)}


def names() -> list[str]:
    """Of the models that come with the package."""
    return sorted(config.parent.name for config in MODELS.glob(f"*/{CONFIG}"))


def find(name: str) -> Shipped:
    """A model by its name or alias; raises UserError where none is called so."""
    folder = MODELS / ALIASES.get(name, name)
    if ALIASES.get(name, name) not in names():
        raise UserError(f"{name}: no such model; choose from {', '.join(names())}")
    config = json.loads((folder / CONFIG).read_text())
    weights = folder / WEIGHTS
    scores = folder / SCORES
    return Shipped(
        name=folder.name,
        aliases=tuple(alias for alias, meant in ALIASES.items() if meant == folder.name),
        network=config["network"],
        width=config["network_options"].get("width"),
        fusion=config["fusion"],
        guide=config["guide"],
        mpp=config["mpp"],
        parameters=parameters(weights),
        bytes=weights.stat().st_size,
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        trained_on=tuple({part["name"]: part for part in trained_on(config["origin"])}.values()),
        scores=json.loads(scores.read_text()) if scores.is_file() else {},
        folder=folder,
    )


def trained_on(origin: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Name, license, images and groups of every data set that a model, or one that it started from, was trained on."""
    if "started_from" in origin:
        yield from trained_on(origin["started_from"])
    for part in origin.get("trained_on", ()):
        yield {"groups": [], **part}


def parameters(weights: Path) -> int:
    """How many numbers of a safetensors file are trained: its header says the shapes, behind 8 bytes of its length."""
    with weights.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(
        math.prod(tensor["shape"])
        for name, tensor in header.items()
        if name != "__metadata__" and name.rpartition(".")[2] not in BUFFERS
    )


def listing(models: Sequence[Shipped]) -> str:
    """What a terminal shows of models: what they are, how they score, and what they were trained on."""
    called = [f"{model.name} ({', '.join(model.aliases)})" if model.aliases else model.name for model in models]
    kinds = [["model", "network", "guide", "fusion", "weights", "file", "mpp"]]
    for name, model in zip(called, models, strict=True):
        network = model.network if model.width is None else f"{model.network} {model.width}"
        kinds.append([name, network, model.guide or "-", model.fusion or "-", f"{model.parameters / 1e6:.1f} M",
                      f"{model.bytes / 1e6:.1f} MB", f"{model.mpp:g}"])
    titles = {set_name: scores["title"] for model in models for set_name, scores in model.scores.items()}
    rows = [[" ".join(METRICS.values()), *(model.name for model in models)]]
    for set_name, title in titles.items():
        rows.append([title, *(_short(model.scores.get(set_name)) for model in models)])
    data = [
        textwrap.fill(f"{model.name}: trained on " + ", ".join(
            f"{part['name']} ({part['images']} images, {part['license']})" for part in model.trained_on
        ), 88, subsequent_indent="  ")
        for model in models
    ]
    return "\n".join([*_aligned(kinds), "", *_aligned(rows), "", *data])


def _short(scores: dict[str, Any] | None) -> str:
    return "-" if scores is None else " ".join(f"{scores[metric][0]:.3f}".removeprefix("0") for metric in METRICS)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
