"""Splits that never divide a patient, slide or organ, and the manifest that proves which images were where."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from nuguide.datasets.conic import conic_split
from nuguide.datasets.dataset import Dataset
from nuguide.types import UserError

DRAWS = 200                 # among which a representative part is sought

# Divisions that belong to a data set: its groups -> (train, held) indices.
OWN_SPLITS: dict[str, Callable[[Sequence[str]], tuple[list[int], list[int]]]] = {"conic": conic_split}


@dataclass(frozen=True, order=True)
class Member:
    """One image of a split: its data set, its id and group there, and the SHA-256 of its decoded pixels."""

    dataset: str
    id: str
    group: str
    sha256: str


@dataclass(frozen=True)
class SplitManifest:
    """Which images were in which part of a split, such as "train" and "val".

    Attributes:
        parts: name -> members, ordered by data set and id.
        sha256: of the parts as canonical JSON; it names the split in a checkpoint.
    """

    parts: dict[str, tuple[Member, ...]]
    sha256: str


def grouped_folds(groups: Sequence[str], folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(train, val) indices of every fold; each image is in `val` once, and no group is on both sides.

    Groups go from the largest to the smallest, in an order that the seed draws among equals, to the fold that has the
    fewest images; so the folds differ by at most the size of the largest group.

    Raises ValueError where there are fewer than 2 folds or fewer groups than folds.
    """
    if not 2 <= folds <= len(set(groups)):
        raise ValueError(f"{len(set(groups))} groups cannot be divided into {folds} folds; choose from 2 to the groups")
    sizes = Counter(groups)
    drawn = _draw_order(groups, np.random.default_rng(seed))
    images_of = [0] * folds
    fold_of: dict[str, int] = {}
    for group in sorted(drawn, key=lambda group: -sizes[group]):
        fold_of[group] = int(np.argmin(images_of))
        images_of[fold_of[group]] += sizes[group]
    return [_divide(groups, {group for group in fold_of if fold_of[group] == fold}) for fold in range(folds)]


def own_split(name: str, groups: Sequence[str]) -> tuple[list[int], list[int]]:
    """(train, held) indices of the division that belongs to the data set `name`, one of `OWN_SPLITS`.

    Raises UserError where it has none, or these groups cannot be divided so.
    """
    if name not in OWN_SPLITS:
        raise UserError(f"{name} has no split of its own; only {', '.join(OWN_SPLITS)} has; leave --split own out")
    try:
        return OWN_SPLITS[name](groups)
    except ValueError as error:
        raise UserError(f"{name}: its own split needs the whole set ({' '.join(str(error).split())})") from error


def hold_out(
    groups: Sequence[str], held: float | Collection[str], seed: int = 0, like: Sequence[float] | None = None
) -> tuple[list[int], list[int]]:
    """(train, held) indices, no group on both sides.

    Args:
        held: the names of the groups to hold out, or a fraction of the images in (0, 1): groups are then taken in an
            order that the seed draws, each where it brings the count nearer to the fraction; at least one is held and
            one is not.
        like: a value of each image, such as the share of its area that nuclei cover. Of `DRAWS` draws, that one is
            taken in which the held images' values are distributed most like all images' (least Wasserstein distance).

    Raises ValueError for a name that is no group, a fraction outside (0, 1), or where one side would be empty.
    """
    if isinstance(held, str):
        held = [held]
    if isinstance(held, Collection):
        names = set(held)
        if unknown := sorted(names - set(groups)):
            raise ValueError(f"unknown groups {', '.join(unknown)}; choose from {', '.join(sorted(set(groups)))}")
    else:
        rng = np.random.default_rng(seed)
        names = _draw_fraction(groups, held, rng)
        if like is not None:
            draws = [names, *(_draw_fraction(groups, held, rng) for _ in range(DRAWS - 1))]
            names = min(draws, key=lambda drawn: _distance(groups, drawn, like))
    train, val = _divide(groups, names)
    if not train or not val:
        raise ValueError(f"holding out {len(names)} of {len(set(groups))} groups leaves one side without images")
    return train, val


def _draw_fraction(groups: Sequence[str], fraction: float, rng: np.random.Generator) -> set[str]:
    """Groups that together hold about this fraction of the images."""
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must lie between 0 and 1, but is {fraction}")
    sizes, wanted = Counter(groups), fraction * len(groups)
    chosen: set[str] = set()
    count = 0
    drawn = _draw_order(groups, rng)
    for group in drawn:
        if abs(count + sizes[group] - wanted) < abs(count - wanted):
            chosen.add(group)
            count += sizes[group]
    if len(chosen) == len(drawn):
        chosen.remove(drawn[-1])
    return chosen or set(drawn[:1])


def _distance(groups: Sequence[str], held: Collection[str], values: Sequence[float]) -> float:
    """The Wasserstein distance between the values of the held images and of all, by 101 quantiles."""
    places = np.linspace(0, 1, 101)
    chosen = [value for group, value in zip(groups, values, strict=True) if group in held]
    return float(np.abs(np.quantile(chosen, places) - np.quantile(values, places)).mean())


def _draw_order(groups: Sequence[str], rng: np.random.Generator) -> list[str]:
    names = sorted(set(groups))  # so that the draw depends on the names and the seed alone
    return [names[index] for index in rng.permutation(len(names))]


def _divide(groups: Sequence[str], held: Collection[str]) -> tuple[list[int], list[int]]:
    train = [index for index, group in enumerate(groups) if group not in held]
    return train, [index for index, group in enumerate(groups) if group in held]


def content_hash(image_rgb: np.ndarray) -> str:
    """The SHA-256 of the size and pixels of an image (H, W, 3) uint8; file name and compression do not count."""
    digest = hashlib.sha256(repr(image_rgb.shape).encode())
    digest.update(np.ascontiguousarray(image_rgb).data)
    return digest.hexdigest()


def write_manifest(path: Path, parts: Mapping[str, Sequence[Dataset]]) -> SplitManifest:
    """Reads every image of the parts, and writes to `path` (JSON) which images they are, by content.

    Args:
        parts: name of the part -> the data sets in it, such as {"train": [tnbc.subset(train)], ...}.

    Raises UserError where an image cannot be read or `path` not written; a half-written file is never left behind.
    """
    return write_members(path, {name: _members(datasets) for name, datasets in parts.items()})


def write_folds(folder: Path, datasets: Sequence[Dataset], folds: int, seed: int) -> list[SplitManifest]:
    """Writes one manifest a fold, `folder`/fold_0.json and so on, each with the parts "train" and "val".

    Every image is in "val" once, and no group (of one data set) is on both sides: see `grouped_folds`. Each image is
    read once for all folds.

    Raises UserError where an image cannot be read, the folder not be written, or the groups are too few for the folds.
    """
    members = _members(datasets)
    try:
        indices = grouped_folds([f"{member.dataset}/{member.group}" for member in members], folds, seed)
    except ValueError as error:
        raise UserError(f"{', '.join(dataset.name for dataset in datasets)}: {error}") from error
    return _write_divided(folder, members, indices)


def write_own_split(folder: Path, dataset: Dataset) -> list[SplitManifest]:
    """Writes `folder`/fold_0.json with the division that belongs to the data set (`own_split`), as `write_folds` does.

    Raises UserError where it has none, an image cannot be read, or the folder not be written.
    """
    own_split(dataset.name, dataset.groups)                 # refused before every image is read
    members = _members([dataset])
    return _write_divided(folder, members, [own_split(dataset.name, [member.group for member in members])])


def _write_divided(
    folder: Path, members: Sequence[Member], indices: Sequence[tuple[list[int], list[int]]]
) -> list[SplitManifest]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} for the folds: {error.strerror}; name another") from error
    parts = [{"train": [members[i] for i in train], "val": [members[i] for i in val]} for train, val in indices]
    return [write_members(folder / f"fold_{fold}.json", part) for fold, part in enumerate(parts)]


def write_members(path: Path, parts: Mapping[str, Sequence[Member]]) -> SplitManifest:
    """Writes to `path` (JSON) which images each part has, known already; errors as of `write_manifest`."""
    members = {name: tuple(sorted(part)) for name, part in parts.items()}
    manifest = SplitManifest(members, _split_hash(members))
    content = {"sha256": manifest.sha256, "parts": _as_json(members)}
    half = path.with_name(path.name + ".part")
    try:
        half.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(half, path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise UserError(f"cannot write the split manifest {path}: {error.strerror}") from error
    return manifest


def read_manifest(path: Path) -> SplitManifest:
    """The manifest that `write_manifest` wrote; UserError where it cannot be read or was changed since."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parts = {name: tuple(Member(**row) for row in rows) for name, rows in content["parts"].items()}
        stated = content["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the split manifest {path}: {error}") from error
    if stated != _split_hash(parts):
        raise UserError(f"{path} was changed by hand: its parts no longer have the hash that it states; write it again")
    return SplitManifest(parts, stated)


def shared_content(manifest: SplitManifest) -> list[list[tuple[str, Member]]]:
    """Every set of identical images, each with its part, that lies in more than one part."""
    return _in_several_parts(manifest, lambda member: member.sha256)


def shared_groups(manifest: SplitManifest) -> list[list[tuple[str, Member]]]:
    """The images, each with its part, of every group of a data set that lies in more than one part."""
    return _in_several_parts(manifest, lambda member: (member.dataset, member.group))


def _in_several_parts(manifest: SplitManifest, key) -> list[list[tuple[str, Member]]]:
    alike: dict[object, list[tuple[str, Member]]] = defaultdict(list)
    for part, members in manifest.parts.items():
        for member in members:
            alike[key(member)].append((part, member))
    return [places for places in alike.values() if len({part for part, _ in places}) > 1]


def members_of(dataset: Dataset) -> list[Member]:
    """Every image of a data set, in its order, by content: all are read."""
    return [
        Member(dataset.name, entry.id, entry.group, content_hash(dataset[index].image_rgb))
        for index, entry in enumerate(dataset.entries)
    ]


def _members(datasets: Sequence[Dataset]) -> list[Member]:
    return sorted(member for dataset in datasets for member in members_of(dataset))


def _as_json(parts: Mapping[str, Sequence[Member]]) -> dict[str, list[dict[str, str]]]:
    return {name: [asdict(member) for member in members] for name, members in parts.items()}


def _split_hash(parts: Mapping[str, Sequence[Member]]) -> str:
    return hashlib.sha256(json.dumps(_as_json(parts), sort_keys=True).encode()).hexdigest()
