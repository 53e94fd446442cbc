"""One tiny arm of every table of the papers on drawn tissue, from data to tables and figures, in a minute or two.

    python benchmarks/smoke.py [--out FOLDER]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from nuguide.experiments.cli import main as experiments

ROOT = Path(__file__).resolve().parents[1]
ARMS = {"table1": ["unet", "eunet3plus"], "table2": ["relu", "eunet3plus"], "table3": ["eunet3plus", "cross"],
        "table4": ["x_gfb_efficientnet_lite0"]}
TINY = ["--width", "2", "--patch-px", "32", "--batch", "2", "--budget", "0.02", "--folds", "3", "--only-folds", "0"]


def draw_set(root: Path) -> None:
    """Six drawn images of three organs as ROOT/cryonuseg, in the layout of images/, labels/ and manifest.csv."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import draw_tissue  # pyright: ignore[reportMissingImports]

    place = root / "cryonuseg"
    rows = ["id,group,mpp"]
    for part in ("images", "labels"):
        (place / part).mkdir(parents=True)
    for seed in range(6):
        image, labels = draw_tissue(seed, (96, 96), 8, (7, 10))
        Image.fromarray(image).save(place / "images" / f"drawn_{seed}.png")
        Image.fromarray(labels.astype(np.uint16)).save(place / "labels" / f"drawn_{seed}.png")
        rows.append(f"drawn_{seed},organ {seed % 3},0.25")
    (place / "manifest.csv").write_text("\n".join(rows) + "\n")


def command(*arguments: object) -> None:
    """`nuguide-experiments` with these arguments; ends the program where it fails."""
    try:
        experiments([str(argument) for argument in arguments])
    except SystemExit as error:
        if error.code:
            raise


def main() -> None:
    """Draw, run, tabulate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", given or Path(folder) / "out"
        draw_set(data)
        for table, arms in ARMS.items():
            command("run", table, "--data-root", data, "--sets", "cryonuseg", "--out", out / "runs", "--arms", *arms,
                    "--guide", "efficientnet_lite0", *TINY)
        command("tables", "--out", out / "runs", "--to", out / "tables")
        command("figures", "--out", out / "runs", "--to", out / "figures", "--data-root", data)
        made = sorted(path.name for part in ("tables", "figures") for path in (out / part).iterdir())
        expected = {f"{name}{ending}" for name in ARMS for ending in (".md", ".tex", ".bars.png", ".violins.png")}
        if missing := expected - set(made):
            sys.exit(f"not made: {', '.join(sorted(missing))}")
        print(f"{len(made)} tables and figures made")


if __name__ == "__main__":
    main()
