"""Segments two tissue pictures that come inside published wheels, as `make demo` calls it.

The H&E picture is in the wheel of stardist (installed here without its dependencies, for the picture alone), the
immunohistochemistry picture in scikit-image. Both were taken at about 20x: 0.5 microns per pixel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import skimage.data
from PIL import Image

DEMO = Path("demo")


def main() -> int:
    """Gather the pictures, segment them by the command line, say where the results lie."""
    pictures = DEMO / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    wheel = DEMO / "wheel"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    install += ["--disable-pip-version-check", "--only-binary", ":all:", "--target", str(wheel), "stardist==0.9.2"]
    histo = wheel / "stardist" / "data" / "images" / "histo.jpg"
    if histo.is_file() or subprocess.run(install, stderr=subprocess.DEVNULL).returncode == 0:
        shutil.copyfile(histo, pictures / "he.jpg")
    else:
        print("the wheel with the H&E picture could not be fetched; the other picture is segmented alone")
    Image.fromarray(skimage.data.immunohistochemistry()).save(pictures / "ihc.png")

    results = DEMO / "results"
    command = ["nuguide", "segment", str(pictures), "--out", str(results), "--mpp", "0.5", "--overwrite"]
    print("$", *command, flush=True)
    start = time.perf_counter()
    code = subprocess.run([str(Path(sys.executable).with_name("nuguide")), *command[1:]]).returncode
    if code:
        return code
    print(f"""
Done in {time.perf_counter() - start:.0f} s. Look at
  {results}/he.overlay.png, {results}/ihc.overlay.png     the pictures with every nucleus outlined (any viewer)
  {results}/he.csv                                   one row a nucleus: size, shape, stain, probability (a spreadsheet)
  {results}/he.geojson                               detections with measurements (QuPath: open {pictures}/he.jpg,
                                                         then File > Import objects from file)
  {results}/he.labels.tif                            instance label map (Fiji, napari)
  {results}/summary.csv                              one row an image
The same for your own: .venv/bin/nuguide segment IMAGE_OR_FOLDER --out DIR --mpp 0.25
(microns per pixel: 0.25 for a 40x scan, 0.5 for 20x)""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
