"""The training data's speed and memory: pairs a second, each stage's share, growth with workers, growth over time.

    python benchmarks/data_throughput.py                         # 512 crops from 2-megapixel JPEGs, no workers
    python benchmarks/data_throughput.py --workers 1 2 4 8
    python benchmarks/data_throughput.py --photographs 640x640   # cut beforehand, as the published data are
    python benchmarks/data_throughput.py --memory 50000          # resident memory over 50,000 small batches

Photographs are scikit-image's, enlarged, with noise for the detail that enlarging lacks. OpenCV runs on one thread, so
that pairs a second without workers are those of one core. Stages are measured by their time on the processor, which
other programs on the machine change less than they change pairs a second.
"""

import argparse
import cProfile
import itertools
import multiprocessing
import os
import pathlib
import pstats
import sys
import tempfile
import time

import cv2
import numpy as np
from PIL import Image
from skimage import data as photographs

from faithdiff_jax.data.loader import DataConfig, Loader
from faithdiff_jax.data.mixture import SourceConfig
from faithdiff_jax.files.tokenizers import Tokenizers

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
from tiny import write_tokenizer

NAMES = ("astronaut", "chelsea", "coffee", "rocket")
CAPTION = (
    "The image features a small cat with green eyes, which sits on a wooden table next to a cup of coffee. It rests."
)
# What a profile calls a stage's outermost function: (file, function). Reading and tokenising include their calls.
STAGES = {
    "read": (("sources.py", "__getitem__"),),
    "decode": (("decode.py", "decode"),),
    "crop": (("samples.py", "_crop_photo"),),
    "degrade": (("degrade.py", "degrade"),),
    "resize back up": (("Image.py", "resize"),),
    "tokenise": (("tokenizers.py", "__call__"),),
    "to float": (("loader.py", "_stack_floats"),),
}


def write_photographs(folder: pathlib.Path, count: int, quality: int, size: tuple[int, int]) -> None:
    """JPEGs of the middle of 1632 x 1224 pixels, each with a caption."""
    width, height = size
    left, top = (1632 - width) // 2, (1224 - height) // 2
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number, name in zip(range(count), itertools.cycle(NAMES)):
        large = Image.fromarray(getattr(photographs, name)()).resize((1632, 1224), Image.Resampling.BICUBIC)
        noisy = np.asarray(large) + rng.normal(0, 4, (1224, 1632, 1))
        photograph = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{number:03}.jpg", quality=quality)
        (folder / f"{number:03}.txt").write_text(CAPTION)


def write_small_pairs(folder: pathlib.Path, count: int) -> None:
    """Pairs that cost next to nothing, in the published layout."""
    for name, size in (("HR_crops", 16), ("LR_crops", 4)):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((size, size, 3), number, np.uint8)).save(folder / name / f"{number:03}.png")


def stage_shares(loader: Loader, batches: int) -> None:
    """Milliseconds of the processor a pair, of each stage, from a profile of this process."""
    steps = iter(loader)
    next(steps)
    begin = time.process_time()
    for _ in range(batches):
        next(steps)
    plain = (time.process_time() - begin) / (batches * loader.batch)
    print(f"{1e3 * plain:.1f} ms of one core a pair: {1 / plain:.1f} pairs a second; with the profiler on:")
    profile = cProfile.Profile(time.process_time)
    profile.enable()
    for _ in range(batches):
        next(steps)
    profile.disable()
    stats = pstats.Stats(profile)
    pairs, left = batches * loader.batch, stats.total_tt
    print(f"{'stage':16}{'ms a pair':>10}{'share':>8}")
    rows = {stage: stage_seconds(stats, functions) for stage, functions in STAGES.items()}
    for stage, seconds in (*rows.items(), ("everything else", left - sum(rows.values()))):
        print(f"{stage:16}{1e3 * seconds / pairs:10.2f}{seconds / left:8.1%}")


def stage_seconds(stats: pstats.Stats, functions) -> float:
    return sum(
        entry[3]
        for (file, _, function), entry in stats.stats.items()
        if (os.path.basename(file), function) in functions
    )


def pairs_a_second(loader: Loader, batches: int) -> float:
    """The rate after each worker has given two batches: starting one takes seconds."""
    with iter(loader) as steps:
        for _ in range(2 * max(1, loader.config.workers)):
            next(steps)
        begin = time.perf_counter()
        for _ in range(batches):
            next(steps)
        return batches * loader.batch / (time.perf_counter() - begin)


def resident_bytes() -> list[int]:
    """Resident memory of this process and of each worker, the shared memory included."""
    processes = [os.getpid(), *sorted(child.pid for child in multiprocessing.active_children())]
    pages = [int(pathlib.Path(f"/proc/{number}/statm").read_text().split()[1]) for number in processes]
    return [count * os.sysconf("SC_PAGE_SIZE") for count in pages]


def memory_growth(loader: Loader, batches: int) -> None:
    """Memory at ten moments of a long run."""
    with iter(loader) as steps:
        begin = time.perf_counter()
        for number in range(1, batches + 1):
            next(steps)
            if number % max(1, batches // 10) == 0:
                sizes = ", ".join(f"{size / 2**20:.1f}" for size in resident_bytes())
                shared = os.statvfs("/dev/shm")
                used = (shared.f_blocks - shared.f_bfree) * shared.f_frsize / 2**20
                took = time.perf_counter() - begin
                print(f"{number:7,} batches {took:6.0f} s  MiB, main then workers: {sizes}; /dev/shm {used:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--pairs", type=int, default=96, help="pairs of each measurement")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=512)
    parser.add_argument("--photographs", default="1632x1224", help="their size, up to this one")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEG photographs")
    parser.add_argument(
        "--tokenizers", type=pathlib.Path, nargs="+", help="folders; two small made-up ones if not given"
    )
    parser.add_argument("--memory", type=int, metavar="BATCHES", help="measure memory instead of speed")
    flags = parser.parse_args()
    cv2.setNumThreads(0)

    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        folders = flags.tokenizers or [write_tokenizer(root / "1"), write_tokenizer(root / "2", pad_token="!")]
        tokenize = Tokenizers.load(folders)
        if flags.memory:
            write_small_pairs(root / "pairs", 100)
            source = SourceConfig(pairs=str(root / "pairs"))
            for workers in flags.workers:
                print(f"{workers} workers")
                settings = DataConfig(sources=(source,), crop=16, workers=workers)
                memory_growth(Loader(settings, tokenize, batch=2), flags.memory)
            return

        width, _, height = flags.photographs.partition("x")
        write_photographs(root / "photographs", 24, flags.quality, (int(width), int(height)))
        source = SourceConfig(photos=str(root / "photographs"))
        batches = -(-flags.pairs // flags.batch)
        for workers in flags.workers:
            settings = DataConfig(sources=(source,), crop=flags.crop, workers=workers)
            rate = pairs_a_second(Loader(settings, tokenize, batch=flags.batch), batches)
            print(f"{workers} workers: {rate:.1f} pairs a second, {rate / max(1, workers):.1f} a worker", flush=True)
        settings = DataConfig(sources=(source,), crop=flags.crop)
        stage_shares(Loader(settings, tokenize, batch=flags.batch), batches)


if __name__ == "__main__":
    main()
