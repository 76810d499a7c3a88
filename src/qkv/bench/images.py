"""Small labelled images for training from packages: handwritten digits, and photographs of clothes.

``digits``: 1797 digits of 8 x 8 pixels, from an installed scikit-learn (its file is read, the library is not imported).
``fashion-mnist``: 70 000 grey photographs of 28 x 28 pixels in ten classes, from Debian's package ``dataset-fashion-mnist`` or
from four files in ``$QKV_CACHE/fashion-mnist``. Nothing is shipped; files are checked before they are read.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qkv.bench.packages import cache_dir
from qkv.core.errors import AssetError, MissingDependency, UnknownName
from qkv.core.spec import near

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FASHION = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


class Images(NamedTuple):
    """Images ``[N, C, height, width]`` in float32, mean 0 and deviation 1 over the training set, and labels ``[N]``."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor


def images(name: str) -> Images:
    """The data set `name`: ``digits`` or ``fashion-mnist``. Raises `UnknownName`, `MissingDependency`, `AssetError`."""
    if name not in _SETS:
        raise UnknownName(f"there are no images {name!r}{near(name, _SETS)}")
    return _SETS[name]()


def _digits() -> Images:
    """Every fifth digit is held out."""
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise MissingDependency("the digits come with scikit-learn, which is not installed: pip install scikit-learn")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    if not path.is_file():
        raise AssetError(f"{path} is missing: this scikit-learn does not carry the digits; install 1.x")
    with gzip.open(path, "rt") as file:
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    if table.shape != (1797, 65):
        raise AssetError(f"{path} holds {tuple(table.shape)} numbers instead of (1797, 65)")
    x, y = table[:, :64].reshape(-1, 1, 8, 8), table[:, 64].long()
    held = torch.arange(len(x)) % 5 == 0
    return _normal(x[~held], y[~held], x[held], y[held])


def _fashion() -> Images:
    folder = next((f for f in (cache_dir() / "fashion-mnist", DEBIAN) if f.is_dir()), None)
    if folder is None:
        raise AssetError("Fashion-MNIST comes with Debian's package: apt-get install dataset-fashion-mnist; or put its four "
                         f"files ({', '.join(FASHION)}) into {cache_dir() / 'fashion-mnist'}")  # fmt: skip
    parts = []
    for name, digest in FASHION.items():
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != digest:
            raise AssetError(
                f"{path} is {'damaged or another file' if data else 'missing'}; take it from the package again"
            )
        raw = torch.frombuffer(bytearray(gzip.decompress(data)), dtype=torch.uint8)
        parts.append(raw[16:].reshape(-1, 1, 28, 28).float() if "images" in name else raw[8:].long())
    return _normal(*parts)


def _normal(x: Tensor, y: Tensor, held: Tensor, held_labels: Tensor) -> Images:
    mean, std = x.mean(), x.std()
    return Images((x - mean) / std, y, (held - mean) / std, held_labels)


_SETS = {"digits": _digits, "fashion-mnist": _fashion}
