"""`faithdiff serve` under load: pictures of mixed sizes at once, with bad requests among them, and SIGTERM at the end.

    python benchmarks/service.py
    python benchmarks/service.py --pictures 50 --bad 10 --rounds 4 --flags="--batch 4 --multiple 128"

The service is a process of its own. In every round all requests are sent at once, each on a connection of its own, and
every picture is waited for, fetched and looked at. After the last round the same is sent again, and SIGTERM as soon as
all of it has been taken on. Memory is that of the whole process (resident), after each round.
"""

import argparse
import concurrent.futures
import io
import os
import pathlib
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.parse

import httpx2 as httpx
import numpy as np
from PIL import Image

ORIGINALS = pathlib.Path(__file__).parent.parent / "examples" / "originals"
SCALE = 2


def pictures(count: int, least: int, most: int) -> list[bytes]:
    """PNG files of random sizes, cut out of the example photographs."""
    rng = np.random.default_rng(0)
    sources = [Image.open(path).convert("RGB") for path in sorted(ORIGINALS.glob("*.png"))]
    made = []
    for number in range(count):
        source, (width, height) = sources[number % len(sources)], rng.integers(least, most + 1, 2).tolist()
        left, top = (int(rng.integers(0, have - want)) for have, want in zip(source.size, (width, height), strict=True))
        file = io.BytesIO()
        source.crop((left, top, left + width, top + height)).save(file, "PNG")
        made.append(file.getvalue())
    return made


def cut_off(place: str, data: bytes) -> int:
    """A request that promises more than it sends, and goes; there is no answer to it."""
    where = urllib.parse.urlsplit(place)
    head = f"POST /v1/pictures HTTP/1.1\r\nhost: {where.netloc}\r\ncontent-length: {len(data) + 999}\r\n"
    with socket.create_connection((str(where.hostname), int(where.port or 80))) as connection:
        connection.sendall(head.encode() + b"content-type: multipart/form-data; boundary=x\r\n\r\n" + data)
    return 0


def bad(number: int, place: str, client: httpx.Client, good: bytes) -> tuple[int, int]:
    """Send the bad request of that number: the status that there is, and the one that there must be."""
    post = lambda data=good, **fields: client.post(  # noqa: E731
        "/v1/pictures", files={"picture": ("a.png", data, "image/png")}, data=fields
    )
    kinds = [
        lambda: (post(steps="0").status_code, 422),
        lambda: (post(b"<html>").status_code, 422),
        lambda: (post(good[: len(good) // 2]).status_code, 422),
        lambda: (post(bytes(2**25 + 1)).status_code, 413),
        lambda: (post(caption="word " * 10_000).status_code, 400),
        lambda: (post(nonsense="1").status_code, 422),
        lambda: (client.post("/v1/pictures", json={}).status_code, 400),
        lambda: (cut_off(place, good), 0),
    ]
    return kinds[number % len(kinds)]()


def fetched(place: str, data: bytes, seed: int, taken: list[str]) -> float:
    """Send a picture, wait for it and look at it; returns the seconds it took."""
    begin = time.perf_counter()
    with httpx.Client(base_url=place, timeout=600) as client:
        fields = {"seed": str(seed), "scale": str(SCALE)}
        answer = client.post("/v1/pictures", files={"picture": ("a.png", data)}, data=fields)
        answer.raise_for_status()
        name = answer.json()["id"]
        taken.append(name)
        while client.get(f"/v1/pictures/{name}", params={"wait": 60}).json()["state"] not in ("done", "failed"):
            pass
        result = client.get(f"/v1/pictures/{name}/result").raise_for_status()
    sent, back = (Image.open(io.BytesIO(one)) for one in (data, result.content))
    back.load()
    assert back.size == tuple(SCALE * side for side in sent.size), (sent.size, back.size)
    return time.perf_counter() - begin


def at_once(place: str, sent: list[bytes], wrong: int, taken: list[str], end: subprocess.Popen | None = None) -> dict:
    """All of it at the same time; with `end`, SIGTERM when all pictures have been taken on."""
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(len(sent) + wrong) as threads:
        good = [threads.submit(fetched, place, data, seed, taken) for seed, data in enumerate(sent)]

        def one_bad(number: int) -> bool:
            with httpx.Client(base_url=place, timeout=600) as client:
                there, must_be = bad(number, place, client, sent[0])
            return there == must_be

        refused = [threads.submit(one_bad, number) for number in range(wrong)]
        concurrent.futures.wait(refused)
        if end is not None:
            while len(taken) < len(sent):
                time.sleep(0.01)
            end.send_signal(signal.SIGTERM)
        seconds = [one.result() for one in good]
    whole = time.perf_counter() - begin
    return {"seconds": whole, "each": seconds, "refused": sum(one.result() for one in refused)}


def resident(process: subprocess.Popen) -> int:
    """Bytes of memory that a process holds."""
    return int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def under_load(process: subprocess.Popen, given: argparse.Namespace) -> None:
    """All rounds, and a line of the table for each."""
    greeting = next(line for line in iter(process.stdout.readline, "") if line.startswith("serving "))
    place = greeting.rpartition(" at ")[2].strip().removesuffix("docs")
    sent = pictures(given.pictures, given.least, given.most)
    sides = f"{given.least} to {given.most} pixels a side"
    print(f"\n{given.pictures} pictures of {sides} and {given.bad} bad requests at once")
    print(f"faithdiff serve {given.flags}\n")
    print("| round | answered | refused as they must be | s | pictures a minute | s each: median, longest | MB |")
    print("|---|---|---|---|---|---|---|")
    for number in [*range(1, given.rounds + 1), "SIGTERM"]:
        last = number == "SIGTERM"
        found = at_once(place, sent, given.bad, [], process if last else None)
        memory = "" if last else f"{resident(process) / 1e6:.0f}"
        each, rate = found["each"], 60 * len(sent) / found["seconds"]
        times = f"{found['seconds']:.1f} | {rate:.0f} | {statistics.median(each):.1f}, {max(each):.1f}"
        print(f"| {number} | {len(each)} | {found['refused']} of {given.bad} | {times} | {memory} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=50)
    parser.add_argument("--bad", type=int, default=16, help="bad requests among them")
    parser.add_argument("--least", type=int, default=32, help="shortest side of a picture, pixels")
    parser.add_argument("--most", type=int, default=96, help="longest side of a picture, pixels")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--flags", default="--batch 4 --multiple 128", help="of faithdiff serve")
    given = parser.parse_args()
    flags = ["--port", "0", "--no-page", "--queue", str(2 * (given.pictures + given.bad)), *shlex.split(given.flags)]
    command = [sys.executable, "-m", "faithdiff_jax", "serve", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        under_load(process, given)
    except BaseException:
        process.kill()
        raise
    process.stdout.read()
    print(f"\nended with {process.wait()}")


if __name__ == "__main__":
    main()
