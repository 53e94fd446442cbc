"""Finds every nucleus in H&E histology, guided by a frozen foundation encoder.

    model = nuguide.load("default")
    nuclei = model.segment(image, mpp=0.25)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .nuclei import Nuclei as Nuclei
    from .predict import Predictor as Predictor
    from .predict import load as load

__version__ = "0.1.0"
__all__ = ["Nuclei", "Predictor", "__version__", "load"]

_HOMES = {"Nuclei": "nuclei", "Predictor": "predict", "load": "predict"}


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; it waits until a model is asked for
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
