"""Fashion-MNIST as tensors, from the four files of the data set.

Debian and Ubuntu have them as a package: `apt-get install dataset-fashion-mnist` puts them into
/usr/share/datasets/fashion-mnist; `apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb FOLDER` does without root.
Xiao, Rasul, Vollgraf, 2017, https://arxiv.org/abs/1708.07747, MIT licence.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIZE, PADDING = 32, 2
MAGIC = {1: 0x801, 3: 0x803}  # IDX: unsigned bytes of so many dimensions


@dataclass(frozen=True)
class Pictures:
    """One half of the data set.

    images  (count, 1, 32, 32) in [-1, 1], float32: 28 pixels and a black border of 2
    labels  (count,) int64, places in `pipelines.fashion.CLASSES`
    """

    images: Float[Tensor, "count 1 32 32"]
    labels: Int[Tensor, " count"]

    def of(self, labels: tuple[int, ...]) -> Float[Tensor, "some 1 32 32"]:
        """The pictures of some classes, in the order of the file."""
        return self.images[torch.isin(self.labels, torch.tensor(labels))]


def load(half: str, folder: Path = FOLDER) -> Pictures:
    """The 60,000 pictures of `half` "train" or the 10,000 of "t10k".

    Raises:
        FileNotFoundError: the folder lacks the files; the message says how to get them.
        ValueError: a file is not what its name says.
    """
    pixels = read_idx(folder / f"{half}-images-idx3-ubyte.gz", dims=3)
    labels = read_idx(folder / f"{half}-labels-idx1-ubyte.gz", dims=1)
    if len(pixels) != len(labels):
        raise ValueError(f"{folder}: {len(pixels)} images but {len(labels)} labels of {half}; get the files again")
    return Pictures(scaled(pixels), labels.long())


def scaled(pixels: UInt8[Tensor, "count 28 28"]) -> Float[Tensor, "count 1 32 32"]:
    """Bytes to [-1, 1], with the border."""
    images = pixels[:, None].float() / 127.5 - 1
    return torch.nn.functional.pad(images, (PADDING,) * 4, value=-1.0)


def read_idx(file: Path, dims: int) -> UInt8[Tensor, "..."]:
    """An IDX file of bytes: magic number, `dims` sizes, data.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another magic number, or more or fewer bytes than the sizes say.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not there. Fashion-MNIST is the Debian package dataset-fashion-mnist (apt-get install "
            "dataset-fashion-mnist); --data FOLDER names another folder with its four .gz files."
        )
    content = gzip.decompress(file.read_bytes())
    head = np.frombuffer(content, ">u4", 1 + dims)
    sizes = [int(size) for size in head[1:]]
    data = np.frombuffer(content, np.uint8, offset=head.nbytes)
    if head[0] != MAGIC[dims] or data.size != np.prod(sizes):
        raise ValueError(
            f"{file}: magic number {head[0]:#x} and {data.size} bytes for sizes {sizes}; not an IDX file of {dims} dims"
        )
    return torch.from_numpy(data.reshape(sizes).copy())
