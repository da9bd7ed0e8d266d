"""The service, with a model that only enlarges: the API, its queue, what it refuses, and how it ends."""

import asyncio
import contextlib
import dataclasses
import io
import json
import re
import struct
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("python_multipart", reason="the extra serve is not installed")

from serving import BAD, Steps, enlarged, guarded, opened, picture, service_of
from starlette.testclient import TestClient

from faithdiff_jax.cli.main import run_command
from faithdiff_jax.errors import InputError
from faithdiff_jax.files.rows import save_restored
from faithdiff_jax.inference.options import RestoreOptions
from faithdiff_jax.service.settings import ServiceOptions

PLACE = "http://127.0.0.1:8000"


@pytest.fixture
def steps(monkeypatch) -> Steps:
    made = Steps()
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", made)
    yield made
    made.free.set()


@contextlib.contextmanager
def client_of(**given):
    with service_of(**given) as service:
        yield TestClient(guarded(service), base_url=PLACE, raise_server_exceptions=False), service


def send(client, data=None, name="a.png", **fields):
    return client.post("/v1/pictures", files={"picture": (name, data or picture())}, data=fields)


def ended(client, answer) -> dict:
    assert answer.status_code == 202, answer.text
    return client.get(f"/v1/pictures/{answer.json()['id']}", params={"wait": 30}).json()


def wait_for(ready, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_picture_is_sent_and_fetched(steps):
    with client_of() as (client, service):
        answer = send(client, caption="a cat", preset="faithful", seed="7", steps="3")
        status = ended(client, answer)
        assert answer.headers["location"] == f"/v1/pictures/{status['id']}"
        assert (status["state"], status["step"], status["steps"], status["place"]) == ("done", 3, 3, None)
        assert (status["name"], status["width"], status["height"]) == ("a.png", 30, 20)
        expected = service.presets["faithful"].replace(seed=7, steps=3)
        assert status["options"]["tile"] == expected.tile
        assert "batch" not in status["options"]
        result = client.get(f"/v1/pictures/{status['id']}/result")
        assert result.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(opened(result.content), enlarged(opened(picture())))
        with Image.open(io.BytesIO(result.content)) as image:
            made = json.loads(image.text["faithdiff"])
        assert (made["caption"], made["options"]["seed"], made["options"]["steps"]) == ("a cat", 7, 3)
        assert service.folder.stat().st_mode & 0o777 == 0o700
        assert [path.suffix for path in service.folder.iterdir()] == [".png"]  # what was sent is gone
    assert not service.folder.exists()


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size, and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


FORM = {"content-type": "multipart/form-data; boundary=x"}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n"
HEAD = b'--x\r\ncontent-disposition: form-data; name="picture"; filename="a"\r\n\r\n'
REFUSED = {
    "text for a number": ({"data": {"steps": "x"}}, 422, "steps: 'x': must be a whole number"),
    "out of range": ({"data": {"steps": "0"}}, 422, "steps is 0: must be a whole number from 1 to 100000"),
    "too many for the model": ({"data": {"steps": "1001"}}, 422, "steps is 1001: must be between 1 and 1000"),
    "no number": ({"data": {"guidance": "nan"}}, 422, "guidance is nan: must be from 0 to 100"),
    "no option": ({"data": {"stepps": "1"}}, 422, "unknown option stepps (known: scale, "),
    "the service's option": ({"data": {"batch": "9"}}, 422, "unknown option batch"),
    "no preset": ({"data": {"preset": "x"}}, 422, "unknown preset 'x' of this model"),
    "not true": ({"data": {"progressive": "yes"}}, 422, "progressive: 'yes': must be true or false"),
    "a result too large": ({"data": {"scale": "32"}}, 422, "turns 30x20 into 960x640 pixels, at most 100,000 are rest"),
    "a result too small": ({"data": {"scale": "0.1"}}, 422, "each side must come to 8 or more"),
    "ten thousand words": ({"data": {"caption": "word " * 10_000}}, 400, "caption: is too long, at most 16,384 bytes"),
    "no Unicode": (
        {"files": {"picture": picture(), "caption": (None, b"\xff")}},
        400,
        "caption: is not UTF-8 (byte 0)",
    ),
    "no picture": ({"files": {"caption": (None, b"a cat")}}, 400, "picture is missing: send the picture as a file"),
    "two pictures": ({"files": [("picture", picture())] * 2}, 400, "picture: is given twice"),
    "a picture as text": ({"files": {"picture": (None, b"a")}}, 400, "picture: must be a file, not text"),
    "another file": ({"files": {"photo": picture()}}, 400, "photo: must be text, not a file"),
    "no form": ({"json": {}}, 400, "content-type is 'application/json': must be multipart/form-data"),
    "another kind": ({"content": b"{}", "headers": FORM}, 400, "not a multipart form ("),
    "cut off": ({"content": HEAD + b"abc", "headers": FORM}, 400, "not a whole multipart form: it ends too early"),
    "no name": ({"content": b"--x\r\na: b\r\n\r\nc\r\n--x--", "headers": FORM}, 400, "a field without a name"),
    "too many fields": ({"data": {f"f{i}": "1" for i in range(99)}}, 400, "too many fields, at most 64"),
    "a page as a picture": (
        {"files": {"picture": ("a.png", b"<html>", "image/png")}},
        422,
        "a.png: not a picture that",
    ),
    "postscript": ({"files": {"picture": ("a.png", POSTSCRIPT, "image/png")}}, 422, "a.png: not a picture"),
    "damaged": ({"files": {"picture": picture(90, 90)[:9000]}}, 422, "damaged or unreadable"),
    "a bomb": ({"files": {"picture": ("b.png", png_of(9999, 9999))}}, 422, "b.png: 9999x9999 pixels, at most 50,000"),
    "a larger bomb": ({"files": {"picture": png_of(60_000, 60_000)}}, 422, "too large, at most 50,000 pixels are read"),
    "one pixel wide": ({"files": {"picture": picture(1, 9)}}, 422, "9x1 pixels, each side must have at least 2"),
    "too many bytes": ({"files": {"picture": bytes(70_000)}}, 413, "the request is too large, at most 65,536 bytes"),
}


@pytest.fixture(scope="module")
def strict():
    with client_of(max_bytes=65_536, max_pixels=50_000, max_result_pixels=100_000) as (client, service):
        yield client, service


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_the_rest_goes_on(strict, steps, name):
    client, service = strict
    given, status, line = REFUSED[name]
    if "files" not in given and "json" not in given and "content" not in given:
        given = {"files": {"picture": picture()}, **given}
    answer = client.post("/v1/pictures", **given)
    assert answer.status_code == status, answer.text
    said = answer.json()["detail"]
    assert line in said
    assert "\n" not in said
    assert str(service.folder) not in said
    assert ended(client, send(client))["state"] == "done"
    assert {path.suffix for path in service.folder.iterdir()} == {".png"}
    assert service.queue.idle


def test_bytes_are_counted_whatever_a_request_says_of_itself(strict, steps):
    client, service = strict
    sent = []

    def body():
        yield HEAD
        for number in range(1000):
            sent.append(number)
            yield bytes(1000)

    answer = client.post("/v1/pictures", content=body(), headers=FORM)
    assert "content-length" not in answer.request.headers
    assert (answer.status_code, answer.json()) == (413, {"detail": REFUSED["too many bytes"][2] + " are read"})
    lying = {**FORM, "content-length": "10"}
    assert client.post("/v1/pictures", content=body(), headers=lying).status_code == 413
    assert service.queue.idle


@pytest.mark.parametrize("path", ["/v1/pictures", "/v1/captions"])
def test_a_slow_sender_loses_its_place(steps, monkeypatch, path):
    """One who sends a byte now and then; another takes as long, and sends all of it."""
    monkeypatch.setattr("faithdiff_jax.service.app.PATIENCE", 0.3)
    form, sent = HEAD + picture() + b"\r\n--x--", []
    names = {"host": "127.0.0.1", **FORM}
    headers = [(name.encode(), value.encode()) for name, value in names.items()]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    with client_of(queue=1, min_rate=1000, describe=lambda pictures: ["one two three a cat"]) as (_, service):

        async def ask(size, seconds):
            said, parts = {}, iter([form[i : i + size] for i in range(0, len(form), size)])

            async def receive():
                await asyncio.sleep(seconds)
                sent.append(part := next(parts, b""))
                return {"type": "http.request", "body": part, "more_body": bool(part)}

            async def hear(message):
                said.update(message)

            await asyncio.wait_for(guarded(service)(dict(scope), receive, hear), 60)
            return said

        said = asyncio.run(ask(1, 0.05))
        assert said["status"] == 408
        line = json.loads(said["body"])["detail"]
        assert re.fullmatch(r"sent too slowly, \d+ bytes in \d s; at least 1,000 a second are waited for", line)
        assert (b"connection", b"close") in said["headers"]
        assert len(sent) < 20
        assert service.queue.idle
        assert not list(service.folder.iterdir())
        assert asyncio.run(ask(len(form) // 3, 0.15))["status"] in (200, 202)


def test_results_are_written_while_the_next_are_restored(steps, monkeypatch):
    written = threading.Event()

    def save(*given):
        assert written.wait(60)
        return save_restored(*given)

    monkeypatch.setattr("faithdiff_jax.service.worker.save_restored", save)
    with client_of() as (client, service):
        sent = [send(client, seed=str(seed)) for seed in range(3)]
        try:
            wait_for(lambda: len(steps.batches) == 2, 20)  # the third waits: results of two batches are in memory
            time.sleep(0.1)
            assert len(steps.batches) == 2
            assert service.queue.counts() == {"waiting": 1, "running": 2, "kept": 0}
        finally:
            written.set()
        assert [ended(client, one)["state"] for one in sent] == ["done"] * 3


def test_the_queue_is_bounded_and_tells_when_to_ask_again(steps):
    steps.free.clear()
    with client_of(queue=2) as (client, service):
        first = send(client).json()
        wait_for(lambda: service.queue.counts()["running"] == 1)
        waiting = [send(client, seed="3").json() for _ in range(2)]
        assert [status["place"] for status in waiting] == [1, 2]
        refused = send(client)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"].startswith("2 pictures wait already, ask again in ")
        assert client.get("/v1/health").json() == {"open": True, "waiting": 2, "running": 1, "kept": 0}
        assert client.delete(f"/v1/pictures/{waiting[0]['id']}").json()["state"] == "cancelled"
        assert client.get(f"/v1/pictures/{waiting[1]['id']}").json()["place"] == 1
        last = send(client)
        assert client.get(f"/v1/pictures/{first['id']}/result").status_code == 409
        steps.free.set()
        assert ended(client, last)["state"] == "done"
        assert len(steps.batches) == 3


def test_progress_previews_and_cancelling(steps):
    steps.free.clear()
    with client_of() as (client, service):
        answer = send(client, steps="5")

        def status():
            return client.get(answer.headers["location"]).json()

        wait_for(lambda: status()["state"] == "running")
        steps.one.release()
        wait_for(lambda: status()["step"] == 1)
        job = service.queue.get(answer.json()["id"])
        job.preview_wanted = True
        steps.one.release()
        wait_for(lambda: status()["preview_step"] == 2)
        threading.Timer(0.2, steps.one.release).start()  # the next step comes while somebody waits for it
        preview = client.get(f"{answer.headers['location']}/preview")
        assert (preview.headers["x-step"], preview.headers["content-type"]) == ("3", "image/jpeg")
        assert opened(preview.content).shape == (80, 120, 3)
        assert client.delete(answer.headers["location"]).json()["state"] == "cancelled"
        steps.free.set()
        wait_for(lambda: service.queue.idle)
        assert status()["step"] <= 4
        assert client.get(f"{answer.headers['location']}/preview").status_code == 409
        assert client.get(f"{answer.headers['location']}/result").json()["detail"].endswith("a picture that is done")
        assert not list(service.folder.iterdir())
        done = ended(client, send(client))
        client.delete(f"/v1/pictures/{done['id']}")
        assert not list(service.folder.iterdir())


def test_those_that_are_alike_go_together(steps):
    steps.free.clear()
    with client_of(own={"batch": 3, "multiple": 128}) as (client, service):
        send(client, seed="100")
        wait_for(lambda: service.queue.counts()["running"] == 1)
        sent = [send(client, picture(*size), seed=str(seed), **more) for seed, size, more in (
            (1, (20, 30), {}), (2, (90, 90), {}), (3, (30, 20), {"caption": "a cat"}), (4, (20, 30), {"steps": "2"}),
            (5, BAD, {}), (6, (20, 30), {}),
        )]  # fmt: skip
        service.queue.cancel(service.queue.get(sent[5].json()["id"]))
        steps.free.set()
        states = [ended(client, one)["state"] for one in sent]
        assert states == ["done", "done", "done", "done", "failed", "cancelled"]
        seeds = [[seed for seed, _ in batch] for batch in steps.batches]
        assert seeds == [[100], [1, 3, 5], [1], [3], [5], [2], [4]]  # without memory for all, one by one
        failed = client.get(f"{sent[4].headers['location']}/result")
        assert failed.status_code == 500
        assert failed.json()["detail"].startswith("not enough memory")


def test_one_of_a_batch_is_cancelled_and_the_others_are_not(steps):
    steps.free.clear()
    with client_of(own={"batch": 2}) as (client, service):
        sent = [send(client, steps="3") for _ in range(2)]
        wait_for(lambda: service.queue.counts()["running"] == 2)
        client.delete(sent[0].headers["location"])
        steps.free.set()
        assert [ended(client, one)["state"] for one in sent] == ["cancelled", "done"]
        assert len(steps.batches) == 1


def test_results_expire(steps, monkeypatch):
    now = time.monotonic
    with client_of(keep=100, kept=2) as (client, service):
        locations = [send(client).headers["location"] for _ in range(3)]
        for location in locations[1:]:
            assert client.get(location, params={"wait": 30}).json()["state"] == "done"
        gone = client.get(locations[0])
        assert gone.status_code == 404
        assert "no such picture, or its result has expired" in gone.json()["detail"]
        assert len(list(service.folder.iterdir())) == 2
        monkeypatch.setattr("faithdiff_jax.service.queue.time.monotonic", lambda: now() + 101)
        assert client.get(locations[2]).status_code == 404
        monkeypatch.undo()
        assert not list(service.folder.iterdir())


def test_who_may_ask():
    with client_of() as (client, _):
        assert client.get("/v1/health", headers={"host": "localhost:1"}).status_code == 200
        assert client.get("/v1/health", headers={"host": "[::1]:1"}).status_code == 200
        refused = client.get("/v1/health", headers={"host": "evil.example"})
        assert (refused.status_code, "give it a token" in refused.json()["detail"]) == (403, True)
        same = {"origin": "http://127.0.0.1:8000"}
        assert client.get("/v1/health", headers=same).status_code == 200
        for origin in ("http://evil.example", "null", "http://127.0.0.1:8001"):
            assert client.post("/v1/pictures", headers={"origin": origin}).status_code == 403
    with client_of(token="secret-token") as (client, _):
        right = "secret-token"
        for path in ("/v1/health", "/docs", "/openapi.json", "/", "/page/"):
            refused = client.get(path)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic realm=")
            assert right not in refused.text
        for wrong in ("Bearer secret-tokem", "Bearer", "Basic !", "Basic c2VjcmV0", f"Digest {right}", right):
            assert client.get("/v1/health", headers={"authorization": wrong}).status_code == 401
        for header in ({"authorization": f"Bearer {right}"}, {"authorization": f"bearer {right}", "host": "a.example"}):
            answer = client.get("/v1/health", headers=header)
            assert answer.status_code == 200
            assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert client.get("/v1/health", auth=("anybody", right)).status_code == 200


def test_the_description_is_made_of_the_options():
    with client_of() as (client, service):
        described = client.get("/openapi.json").json()
        form = described["paths"]["/v1/pictures"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        names = {field.name for field in dataclasses.fields(RestoreOptions)} - {"batch"}
        assert set(form["properties"]) == names | {"picture", "caption", "tile_captions", "preset"}
        steps = form["properties"]["steps"]
        assert (steps["type"], steps["minimum"], steps["maximum"]) == ("integer", 1, 100_000)
        assert steps["default"] == service.defaults.steps
        assert form["properties"]["color_fix"]["enum"] == ["adain", "wavelet", "none"]
        assert form["properties"]["scale"]["exclusiveMinimum"] == 0
        assert "/v1/captions" not in described["paths"]
        page = client.get("/docs").text
        assert all(f"<code>{name}</code>" in page for name in names)
        assert "src=" not in page
        model = client.get("/v1/model").json()
        assert set(model["presets"]) == {"faithful", "detailed"}
        assert model["limits"]["max_pixels"] == service.settings.max_pixels


def test_pictures_are_described_where_there_is_a_captioner(steps):
    seen = []

    def describe(pictures):
        seen.append([one.shape for one in pictures])
        return ["The image features a cat. It sits. It sleeps."]

    with client_of(describe=describe) as (client, service):
        answer = client.post("/v1/captions", files={"picture": picture()})
        assert answer.json() == {"caption": "A cat. It sits."}
        assert seen == [[(20, 30, 3)]]
        assert client.post("/v1/captions", files={"picture": b"x"}).status_code == 422
        assert not list(service.folder.iterdir())


TILED = {"scale": "4", "tile": "16", "overlap": "1"}  # latents of 20x30: two by two tiles


def test_each_tile_is_described_and_restored_by_its_own_caption(steps):
    seen = []

    def describe(pictures):
        seen.append([one.shape for one in pictures])
        return [f"one two three tile {len(seen)}"]

    with client_of(describe=describe) as (client, service):
        described = client.post("/v1/tile_captions", files={"picture": picture()}, data=TILED).json()
        captions = [f"Tile {number}." for number in range(1, 5)]
        assert described == {"tile_captions": captions}
        assert seen == [[(16, 16, 3)], [(16, 16, 3)], [(16, 16, 3)], [(16, 16, 3)]]
        assert not list(service.folder.iterdir())
        status = ended(client, send(client, tile_captions=json.dumps(captions), caption="not read", **TILED))
        assert (status["state"], status["caption"]) == ("done", captions)
        with Image.open(io.BytesIO(client.get(f"/v1/pictures/{status['id']}/result").content)) as image:
            assert json.loads(image.text["faithdiff"])["caption"] == captions
        status = ended(client, send(client, tile_captions=" ", caption="a cat " * 40))
        assert status["caption"] == "a cat " * 40
        assert status["notes"] == ["a caption of 80 words, of which the text encoders read the first 75 at most"]
        for wrong, line in (
            (captions[1:], "caption is a list of 3: must be one text, or 4, one for each tile"),
            ([1] * 4, "tile_captions: must be a JSON list of strings, one for each tile"),
            ("a cat", "tile_captions: must be a JSON list of strings"),
        ):
            refused = send(client, tile_captions=json.dumps(wrong), **TILED)
            assert (refused.status_code, line in refused.json()["detail"]) == (422, True)
        assert "tile_captions: not JSON" in send(client, tile_captions="[").json()["detail"]
        passes = send(client, tile_captions='["a"]', progressive="true")
        assert "progressive is true: takes one caption for a picture" in passes.json()["detail"]
        large = client.post("/v1/tile_captions", files={"picture": picture(300, 300)}, data={"scale": "32"})
        assert (large.status_code, "at most 33,554,432 are restored" in large.json()["detail"]) == (422, True)
        assert service.queue.idle


def test_what_is_taken_on_before_the_end_is_finished_or_handed_back(steps):
    steps.free.clear()
    with client_of() as (client, service):
        first = send(client)
        wait_for(lambda: service.queue.counts()["running"] == 1)
        second = send(client)
        service.queue.close()
        refused = send(client)
        assert (refused.status_code, "about to stop" in refused.json()["detail"]) == (503, True)
        assert "retry-after" in refused.headers
        assert service.queue.unfetched == 0
        service.queue.hand_back()
        steps.free.set()
        for sent in (first, second):
            status = ended(client, sent)
            assert (status["state"], status["error"]) == (
                "handed back",
                "the service stopped before it was restored, send it again",
            )
        assert service.queue.unfetched == 0
        wait_for(lambda: service.queue.idle)
        assert {client.get(sent.headers["location"]).json()["state"] for sent in (first, second)} == {"handed back"}
        assert not list(service.folder.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"port": 65536}, "port is 65536: must be a whole number from 0 to 65535"),
        ({"token": "short"}, "token: must be 8 or more printable ASCII characters without blanks"),
        ({"token": "with a blank"}, "token: must be 8 or more"),
        ({"host": " "}, "host is ' ': must not be empty"),
        ({"queue": 0, "keep": -1}, r"queue is 0: .*; keep is -1: "),
    ],
)
def test_settings(given, message):
    with pytest.raises(InputError, match=message) as caught:
        ServiceOptions(**given)
    assert given.get("token", "?") not in str(caught.value)


def test_what_the_command_refuses(capsys, monkeypatch):
    for flags, line in (
        (["--queue", "x"], "argument --queue: 'x': must be a whole number"),
        (["--max-bytes", "1"], "max_bytes is 1: must be a whole number from 1024"),
        (["--batch", "0"], "batch is 0: must be a whole number from 1 to 1024"),
        (["--multiple", "7"], "multiple is 7: must be a multiple of"),
        (["--model", "nowhere"], "nowhere: no such model directory"),
        (["--steps", "3"], "unrecognized arguments: --steps 3"),
        (["--host", "192.0.2.1"], "192.0.2.1, port 8000: cannot be listened at ("),
    ):
        assert run_command("serve", flags) == 2
        assert line in capsys.readouterr().err
    monkeypatch.setenv("FAITHDIFF_TOKEN", "short")
    assert run_command("serve", []) == 2
    assert "token: must be 8" in capsys.readouterr().err
    monkeypatch.delenv("FAITHDIFF_TOKEN")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert run_command("serve", []) == 2
    assert "pip install 'faithdiff-jax[serve]'" in capsys.readouterr().err
