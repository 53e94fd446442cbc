"""Imports point downwards, heavy libraries wait until they are needed, functions stay short, and only cli prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nuguide

SOURCE = Path(nuguide.__file__).parent

# Module or package -> layer. A module may import from lower layers; within a layer only as `BESIDE` says.
LAYERS = {
    "types": 0,
    "augment": 1, "confidence": 1, "crowd": 1, "datasets": 1, "debris": 1, "download": 1, "export": 1, "fusion": 1,
    "guides": 1, "images": 1, "instances": 1, "losses": 1, "machine": 1, "measure": 1, "metrics": 1, "networks": 1,
    "normalize": 1, "quality": 1, "resample": 1, "runs": 1, "stain": 1, "tiling": 1, "together": 1, "tissue": 1,
    "zoo": 1,
    "batches": 2, "checkpoint": 2, "latents": 2, "nuclei": 2, "recipe": 2, "slides": 2, "widen": 2,
    "calibrate": 3, "callbacks": 3, "cluster": 3, "evaluate": 3, "fanout": 3, "image_run": 3, "loaders": 3,
    "predict": 3, "slide_run": 3, "start": 3, "train": 3, "whole_slide": 3,
    "cli": 4, "cli_data": 4, "experiments": 4,
    "__init__": 5,
}
BESIDE = {
    "augment": {"crowd", "debris", "stain"},  # copies nuclei up to others; lays it on glass; varies the amount of each
    "crowd": {"stain"}, "debris": {"stain"},  # take colors as densities
    "confidence": {"metrics"},       # asks how far the nuclei of two label maps overlap
    "measure": {"runs", "stain"},    # sums over them; unmixes them
    "normalize": {"stain"},          # starts from them
    "quality": {"resample", "stain", "tissue"},  # looks at tissue, its stains, at the network's resolution
    "tissue": {"instances"},         # fills its holes as those of nuclei
    "fusion": {"networks"},          # fuses their deepest features, with their pooling
    "datasets": {"download", "images", "export"},  # gets and reads them, and the polygons that QuPath exports
    "guides": {"download"},          # gets their weights
    "instances": {"resample", "runs"},  # brings label maps to the image's size; finds the pieces of a nucleus
    "machine": {"networks"},         # measures one of their 8-bit convolutions
    "batches": {"latents"},          # hands them out with their patches
    "calibrate": {"predict"},        # runs it
    "cli": {"cli_data"},             # the commands of `nuguide data`
    "evaluate": {"predict"},         # measures it
    "image_run": {"fanout"},         # is one of the jobs of a run
    "whole_slide": {"predict"},      # runs it, tile by tile
    "slide_run": {"fanout", "predict", "whole_slide"},  # one of the jobs of a run; loads a model for its regions
    "cluster": {"slide_run", "whole_slide"},  # where it computes them, and how long that took
    "train": {"calibrate", "callbacks", "loaders", "start"},  # ends with it; runs with these
}
LONGEST = 80                         # lines of a function


def modules() -> dict[Path, str]:
    """Every source file and the module or package of `LAYERS` that it belongs to."""
    return {path: path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in sorted(SOURCE.rglob("*.py"))}


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module or package of nuguide) of every import in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = path.relative_to(SOURCE).with_suffix("").parts
            package = ["nuguide", *base][: len(base) + 1 - node.level] if node.level else []
            names = [".".join([*package, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "nuguide" and parts[-1] != "__version__":
                yield node.lineno, parts[1] if len(parts) > 1 and parts[1] in set(modules().values()) else "__init__"


def test_every_module_has_its_layer() -> None:
    assert set(modules().values()) <= set(LAYERS)
    assert all(LAYERS[above] == LAYERS[below] for above, beside in BESIDE.items() for below in beside)


def test_imports_point_downwards() -> None:
    upwards = [
        f"{path.relative_to(SOURCE)}:{line}: {module} (layer {LAYERS[module]}) imports {other} (layer {LAYERS[other]})"
        for path, module in modules().items()
        for line, other in imported(path)
        if other != module and LAYERS[other] >= LAYERS[module] and other not in BESIDE.get(module, set())
    ]
    assert upwards == []


def test_the_import_reader_sees_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path)
    (tmp_path / "networks").mkdir()
    for file in ("types.py", "train.py", "networks/__init__.py"):
        (tmp_path / file).touch()
    inner = tmp_path / "networks" / "unet.py"
    inner.write_text(
        "import torch\n"
        "import nuguide.train\n"
        "from nuguide import types\n"
        "from ..types import Sample\n"
        "from .. import train, __version__\n"
        "from .blocks import GLU\n"
        "def f():\n"
        "    from nuguide.train import fit\n"
        "    from nuguide import load\n"
    )
    assert list(imported(inner)) == [
        (2, "train"), (3, "types"), (4, "types"), (5, "train"), (6, "networks"), (8, "train"), (9, "__init__")
    ]


def test_importing_nuguide_loads_no_heavy_library() -> None:
    heavy = [
        "torch", "numpy", "pandas", "matplotlib", "pytorch_lightning", "cv2", "skimage", "tifffile", "PIL", "openslide"
    ]
    script = f"import sys, nuguide; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_function_is_longer_than_a_screen_or_two() -> None:
    long = [
        f"{path.relative_to(SOURCE)}:{node.lineno}: {node.name} has {lines} lines"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST
    ]
    assert long == []


def test_only_the_command_line_prints() -> None:
    prints = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path in modules()
        if path.name not in ("cli.py", "cli_data.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == []
