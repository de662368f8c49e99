"""One epoch of training batches: the cached uint8 file against a DataLoader that decodes JPEG files with Pillow.

Both give the same batches (random order, float32, normalised), on one core; rounds are interleaved and the median is
kept. The pictures are the Waterbirds edition found in the data folder or mirror, else generated ones.

    python benchmarks/loader.py            writes benchmarks/results/loader.json
"""

import io
import statistics
import tempfile
import time
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from measuring import row, write  # which makes the checkout's fairtuning importable
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fairtuning.datasets import DataError, files, images, waterbirds

BATCH, SIDE, TARGET = 64, 112, 10.0
MEAN, SPREAD = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.5)


class Files(Dataset):
    """What most code does: a list of files, each opened, decoded and resized whenever it is asked for."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.transform = v2.Compose(
            [
                v2.Resize(SIDE, interpolation=v2.InterpolationMode.BICUBIC),
                v2.CenterCrop(SIDE),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.5] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.paths[i], formats=images.FORMATS) as image:
            return self.transform(image.convert("RGB"))


def cached(pixels: torch.Tensor) -> int:
    count = 0
    for rows in torch.randperm(len(pixels)).split(BATCH):
        batch = pixels[rows].to(torch.float32).div_(255).sub_(MEAN).div_(SPREAD)
        count += len(batch)
    return count


def from_files(loader: DataLoader) -> int:
    return sum(len(batch) for batch in loader)


def pictures(number: int) -> tuple[str, list[bytes]]:
    try:
        [archive] = files.find(waterbirds.RECIPE)
    except DataError:
        rng = np.random.default_rng(0)
        found = []
        for _ in range(number):
            image = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((171, 128))
            image.save(file := io.BytesIO(), "JPEG", quality=75)
            found.append(file.getvalue())
        return "generated pictures, 171 x 128", found
    found = []
    for name, content in files.members(archive.path):
        if PurePosixPath(name).suffix == ".jpg":
            found.append(content())
        if len(found) == number:
            break
    return f"Waterbirds, {archive.edition}", found


def main(number: int = 4096, rounds: int = 5) -> list[dict]:
    torch.set_num_threads(1)
    data, contents = pictures(number)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.jpg" for i in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        start = time.perf_counter()
        decoded = np.stack([images.decode(content, (SIDE, SIDE)) for content in contents])
        packing = time.perf_counter() - start
        np.save(Path(folder) / "pixels.npy", decoded)
        del decoded
        pixels = torch.from_numpy(np.load(Path(folder) / "pixels.npy", mmap_mode="c"))
        loaders = {
            f"DataLoader + Pillow, {workers or 'no'} workers": DataLoader(
                Files(paths), batch_size=BATCH, shuffle=True, num_workers=workers
            )
            for workers in (0, 2)
        }
        work = {"cached uint8": lambda: cached(pixels)}
        work |= {name: lambda loader=loader: from_files(loader) for name, loader in loaders.items()}
        seconds = {name: [] for name in work}
        for _ in range(rounds):
            for name, run in work.items():
                start = time.perf_counter()
                assert run() == len(paths)
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = median["cached uint8"]
    case = f"{len(paths)} images at {SIDE} x {SIDE}, batches of {BATCH} ({data})"
    rows = []
    for name, value in median.items():
        ours = name == "cached uint8"
        speed = f"{len(paths) / value:,.0f} images/s"
        packed = f"; packed once at {len(paths) / packing:,.0f} images/s" if ours else ""
        goal = f">= {TARGET:g}" if name.endswith("no workers") else ""
        rows.append(row(case, name, seconds=value, ratio=value / base, target=goal, note=speed + packed))
    return rows


if __name__ == "__main__":
    write(main(), Path(__file__).parent / "results" / "loader.json", packages=("torch", "torchvision", "pillow"))
