"""`faithdiff serve` as a process: what it restores is what `faithdiff restore` does, and what SIGTERM leaves behind."""

import concurrent.futures
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import httpx2 as httpx
from pictures import encode
from PIL import Image
from serving import Steps, guarded, opened, picture, service_of
from starlette.testclient import TestClient
from test_pipeline import levels_apart, photograph

from faithdiff_jax import SMALL_MODEL
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.inference.pipeline import FaithDiff
from faithdiff_jax.service.server import bound, serve, url_of

STUB = """
import os, sys, time
sys.path.insert(0, os.environ["TESTS"])
from serving import Steps, stub_model
from faithdiff_jax.cli import serve
from faithdiff_jax.cli.main import run_command
from faithdiff_jax.inference import restoration

class Slow(Steps):
    def __call__(self, model, requests, options, *, on_step):
        def look(*given):
            time.sleep(0.1)
            return on_step(*given)
        return super().__call__(model, requests, options, on_step=look)

restoration.restore_all = Slow()
serve.load_model = lambda *given: stub_model()
sys.exit(run_command("serve", ["--no-page", "--port", "0", *sys.argv[1:]]))
"""


@contextlib.contextmanager
def started(folder, *flags: str):
    """The process, of which every step takes a tenth of a second, and a client of it."""
    environment = os.environ | {"TMPDIR": str(folder), "TESTS": os.path.dirname(__file__)}
    command = [sys.executable, "-c", STUB, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        place = process.stdout.readline().rpartition(" at ")[2].strip().removesuffix("docs")
        assert place, process.communicate()[1]
        with httpx.Client(base_url=place, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def send(client, **fields):
    return client.post("/v1/pictures", files={"picture": ("a.png", picture())}, data=fields)


def test_nothing_is_lost_when_it_is_told_to_end(tmp_path):
    with started(tmp_path, "--linger", "60") as (process, client):
        sent = [send(client, seed=str(seed), steps="2").json()["id"] for seed in range(5)]
        assert os.listdir(tmp_path)
        process.send_signal(signal.SIGTERM)
        while client.get("/v1/health").json()["open"]:
            time.sleep(0.02)
        assert send(client).status_code == 503
        for name in sent:
            result = client.get(f"/v1/pictures/{name}/result", params={"wait": 60})
            assert opened(result.content).shape == (80, 120, 3)
        assert process.wait(60) == 0
        said = process.communicate()[0]
        assert said.startswith("finishing ")
        assert said.endswith("stopped\n")
        assert not os.listdir(tmp_path)


def served(act, **settings) -> list[str]:
    """What is said while a service answers `act`, called with a client on another thread, until a signal ends it."""
    said: queue.SimpleQueue[str] = queue.SimpleQueue()
    with service_of(**settings) as service, bound(service.settings) as made:

        def client():
            said.get(timeout=60)
            try:
                with httpx.Client(base_url=url_of(made), timeout=60) as one:
                    act(one)
            except BaseException:
                for _ in range(2):  # nobody else ends it
                    os.kill(os.getpid(), signal.SIGTERM)
                raise

        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            acting = threads.submit(client)
            serve(guarded(service), service, made, "begins", said.put)
            acting.result()
    return [said.get() for _ in range(said.qsize())]


def ask_to_end(client) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    while client.get("/v1/health").json()["open"]:
        time.sleep(0.02)


def test_what_there_is_no_time_for_is_handed_back(monkeypatch):
    steps = Steps()
    steps.free.clear()
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", steps)

    def act(client):
        sent = [send(client, steps="3").json()["id"] for _ in range(3)]
        ask_to_end(client)
        states = [client.get(f"/v1/pictures/{name}", params={"wait": 60}).json()["state"] for name in sent]
        assert states == ["handed back"] * 3
        steps.free.set()

    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert served(act, port=0, drain=0, linger=60) == ["finishing 3 pictures; again to stop at once"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_second_signal_ends_it_at_once(monkeypatch):
    steps = Steps()
    steps.free.clear()
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", steps)

    def act(client):
        send(client)
        ask_to_end(client)
        os.kill(os.getpid(), signal.SIGINT)
        steps.free.set()

    begin = time.monotonic()
    served(act, port=0, drain=10**6, linger=10**6)
    assert time.monotonic() - begin < 60


def test_pictures_are_those_of_the_command(tmp_path):
    """The same files, but for the rounding of a program that stops at every step."""
    (tmp_path / "in").mkdir()
    alpha = np.dstack([photograph(16, 24), np.full((16, 24), 99, np.uint8)])
    sources = {"a": encode(photograph(16, 24)), "b": encode(alpha), "c": encode(photograph(16, 24)[..., 0])}
    for name, data in sources.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(data)
    fields = {"steps": "2", "seed": "5", "scale": "2", "caption": "a cat", "color_fix": "adain"}
    flags = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", value)]
    given = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--batch", "4", *flags]
    assert run_command("restore", given) == 0
    with service_of(FaithDiff.load(SMALL_MODEL), own={"batch": 4}) as service:
        client = TestClient(guarded(service), base_url="http://127.0.0.1")
        sent = {
            name: client.post("/v1/pictures", files={"picture": data}, data=fields).json()["id"]
            for name, data in sources.items()
        }
        for name, number in sent.items():
            result = tmp_path / f"{name}.png"
            result.write_bytes(client.get(f"/v1/pictures/{number}/result", params={"wait": 60}).content)
    for name in sources:
        with Image.open(tmp_path / f"{name}.png") as ours, Image.open(tmp_path / "out" / f"{name}.png") as theirs:
            assert ours.mode == theirs.mode
            largest, share = levels_apart(np.asarray(ours), np.asarray(theirs))
            assert largest <= 1
            assert share < 0.01
            made = [json.loads(one.text["faithdiff"]) for one in (ours, theirs)]
        assert made[0]["options"] == made[1]["options"]
        assert made[0]["caption"] == made[1]["caption"]
