"""Makes examples/data/fashion-mnist-small out of the whole of Fashion-MNIST.

    python scripts/make_demo_data.py FOLDER_OF_FASHION_MNIST [TARGET]

The first 1,000 training and 200 test images of each of the ten classes are kept, in the order of
the original files. The folder holds the four files train-images-idx3-ubyte.gz …
t10k-labels-idx1-ubyte.gz, as Zalando publishes them and as Debian's package dataset-fashion-mnist
installs them.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = REPOSITORY / "examples" / "data" / "fashion-mnist-small"
IMAGES_PER_CLASS = {"train": 1000, "t10k": 200}
CLASSES = 10

Bytes = NDArray[np.uint8]


def main() -> None:
    """Reads the arguments and writes the four files."""
    parser = argparse.ArgumentParser(description="Makes the demo's data set out of Fashion-MNIST.")
    parser.add_argument("source", type=Path, help="folder of the four original .gz files")
    parser.add_argument("target", type=Path, nargs="?", default=TARGET)
    arguments = parser.parse_args()
    arguments.target.mkdir(parents=True, exist_ok=True)
    for part, count in IMAGES_PER_CLASS.items():
        images_name, labels_name = f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"
        images = read_idx(arguments.source / images_name)
        labels = read_idx(arguments.source / labels_name)
        kept = first_of_each_class(labels, count)
        write_idx(arguments.target / images_name, images[kept])
        write_idx(arguments.target / labels_name, labels[kept])
        print(f"{part}: {len(kept)} of {len(labels)} images")


def first_of_each_class(labels: Bytes, count: int) -> NDArray[np.int64]:
    """Positions of the first ``count`` rows of each class, in rising order."""
    positions = [np.flatnonzero(labels == label)[:count] for label in range(CLASSES)]
    short = [label for label in range(CLASSES) if len(positions[label]) < count]
    if short:
        raise SystemExit(f"class {short[0]} has fewer than {count} images")
    return np.sort(np.concatenate(positions))


def read_idx(path: Path) -> Bytes:
    """The bytes of an idx file as an array of its shape."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">u4", dimensions, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_idx(path: Path, array: Bytes) -> None:
    """Writes an idx file; without a time stamp, so that the same array gives the same file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    main()
