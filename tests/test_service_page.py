"""The page of the service in a real browser, with a model that only enlarges."""

import contextlib
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed (the extra page)")
import uvicorn
from browser import launched, needs_chromium
from serving import Steps, opened, picture, service_of

from faithdiff_jax.service.app import build_app
from faithdiff_jax.service.guard import Guard
from faithdiff_jax.service.page import mount
from faithdiff_jax.service.server import bound, url_of

pytestmark = [
    needs_chromium,
    pytest.mark.filterwarnings("default"),  # those of Gradio are not ours
]
WAIT = 60_000  # milliseconds


@pytest.fixture
def steps(monkeypatch) -> Steps:
    made = Steps()
    monkeypatch.setattr("faithdiff_jax.inference.restoration.restore_all", made)
    monkeypatch.setattr("faithdiff_jax.service.page.PREVIEW_EVERY", 0.1)
    yield made
    made.free.set()


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


@contextlib.contextmanager
def served(**given):
    """The address of the page, and its service."""
    with service_of(port=0, **given) as service, bound(service.settings) as made:
        app = Guard(mount(build_app(service), service), service.settings)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [made]})
        thread.start()
        try:
            yield url_of(made), service
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def page_at(browser, place, **context):
    """The page; at the end, nothing has been asked of another place, and no script has met an error."""
    opened_ = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **context})
    page = opened_.new_page()
    page.set_default_timeout(WAIT)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(place)
    page.wait_for_selector("#restore")
    yield page
    opened_.close()
    assert not [url for url in asked if not url.startswith((place, "data:", "blob:"))]
    assert not errors


def give(page, data: bytes, name: str = "a.png") -> None:
    page.set_input_files("input[type=file]", {"name": name, "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("[data-testid=image] img, .image-frame img")


def says(page, text: str) -> None:
    page.wait_for_function("text => document.querySelector('#status').innerText.includes(text)", arg=text)


def test_restoring_and_history(browser, steps):
    steps.free.clear()
    with served() as (place, service), page_at(browser, place) as page:
        give(page, picture())
        page.fill("#caption textarea", "a cat")
        page.fill("#option-seed input", "7")
        page.fill("#option-steps input", "4")
        page.click("#restore")
        says(page, "Begun")
        time.sleep(0.5)
        steps.one.release()
        says(page, "Step 1 of 4")
        time.sleep(0.5)
        steps.one.release()
        page.wait_for_selector("#preview img")
        steps.free.set()
        says(page, "Done: 4 steps, seed 7")
        page.wait_for_function(
            "(images => images.length == 2 && images.every(image => image.naturalWidth))"
            "([...document.querySelectorAll('#slider img')])"
        )
        shown = page.evaluate("[...document.querySelectorAll('#slider img')].map(image => image.naturalWidth)")
        assert shown == [120, 120]
        with page.expect_download() as download:
            page.click("#download a")
        result = download.value.path().read_bytes()
        assert download.value.suggested_filename == "a_restored.png"
        np.testing.assert_array_equal(opened(result), np.repeat(np.repeat(opened(picture()), 4, 0), 4, 1))
        with Image.open(io.BytesIO(result)) as image:
            made = json.loads(image.text["faithdiff"])
        assert (made["caption"], made["options"]["seed"], made["options"]["steps"]) == ("a cat", 7, 4)
        first = page.get_attribute("#download a", "href")
        page.fill("#option-seed input", "8")
        page.click("#restore")
        says(page, "seed 8")
        assert page.get_attribute("#download a", "href") != first
        page.wait_for_function("document.querySelectorAll('#history img').length == 2")
        page.click("#history button >> nth=1")
        says(page, "seed 7")
        assert page.get_attribute("#download a", "href") == first
        assert service.queue.unfetched == 0


def test_presets_and_what_is_refused(browser, steps):
    with served() as (place, service), page_at(browser, place) as page:
        page.click("#restore")
        page.wait_for_selector("text=there is no picture yet")
        page.click("#preset input")
        page.click("[role=option]:has-text('detailed')")
        wanted = str(service.presets["detailed"].steps)
        page.wait_for_function("wanted => document.querySelector('#option-steps input').value == wanted", arg=wanted)
        give(page, picture())
        page.fill("#option-steps input", "0")
        page.click("#restore")
        page.wait_for_selector("text=steps is 0: must be a whole number from 1 to 100000")
        page.fill("#option-steps input", "2")
        page.click("#restore")
        says(page, "Done: 2 steps")


def test_stopping_and_describing(browser, steps):
    steps.free.clear()
    with served(describe=lambda pictures: ["The image features a cat."]) as (place, _):
        with page_at(browser, place) as page:
            give(page, picture())
            page.click("#describe")
            page.wait_for_function("document.querySelector('#caption textarea').value == 'A cat..'")
            page.fill("#option-steps input", "5")
            page.click("#restore")
            says(page, "Begun")
            page.click("#stop")
            says(page, "Cancelled")
        steps.free.set()


def test_captions_of_tiles(browser, steps):
    def describe(pictures):
        return [f"one two three {pictures[0].shape[1]} wide"]

    with served(describe=describe) as (place, service), page_at(browser, place) as page:
        give(page, picture())
        page.fill("#option-scale input", "4")
        page.click("text=Tiles >> nth=0")
        page.fill("#option-tile input", "16")
        page.fill("#option-overlap input", "1")
        page.click("text=Captions of tiles")
        page.click("#describe-tiles")
        four = "16 wide.\n" * 3 + "16 wide."
        page.wait_for_function("text => document.querySelector('#tile-captions textarea').value == text", arg=four)
        page.fill("#tile-captions textarea", "a\n\nb")
        page.click("#restore")
        page.wait_for_selector("text=caption is a list of 3: must be one text, or 4")
        page.fill("#tile-captions textarea", "a\nb\n\nc")
        page.click("#restore")
        says(page, "Done")
        (job,) = service.queue._jobs.values()
        assert job.caption == ["a", "b", "", "c"]


def test_only_what_was_sent_is_read(browser, steps, tmp_path):
    """Neither a file of this machine nor an address, whatever the browser is made to say."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture())
    join = """async ([path, url]) => {
        const config = await (await fetch('config')).json();
        const fn = config.dependencies.find(one => one.targets.some(([id, what]) =>
            what === 'click' && config.components.find(part => part.id === id).props.elem_id === 'restore'));
        const session_hash = Math.random().toString(36);
        const values = fn.inputs.map(id => config.components.find(part => part.id === id).props.value);
        values[0] = {path, url, meta: {_type: 'gradio.FileData'}};
        await fetch('gradio_api/queue/join', {method: 'POST', headers: {'content-type': 'application/json'},
            body: JSON.stringify({data: values, fn_index: fn.id, session_hash, trigger_id: null, event_data: null})});
        const answer = await fetch('gradio_api/queue/data?session_hash=' + session_hash), found = [];
        const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
        for (let text = ''; !text.includes('process_completed');) {
            const {value, done} = await reader.read();
            if (done) break;
            text += value; found.push(value);
        }
        return found.join('');
    }"""
    with served() as (place, _), page_at(browser, place) as page:
        said = page.evaluate(join, [str(secret), None])
        assert '"success":false' in said.replace(" ", "")
        assert "it was not uploaded by a user" in said
        said = page.evaluate(join, ["http://example.invalid/a.png", "http://example.invalid/a.png"])
        assert "must be sent, not its address" in said
        assert page.evaluate("async path => (await fetch('gradio_api/file=' + path)).status", str(secret)) == 403
        assert steps.batches == []
        assert page.evaluate("async () => (await fetch('gradio_api/file=/etc/passwd')).status") == 403


def test_the_token_is_asked_for(browser, steps):
    with served(token="secret-token") as (place, _):
        context = browser.new_context()
        assert context.request.get(place).status == 401
        assert context.request.get(f"{place}page/config").status == 401
        context.close()
        with page_at(browser, place, http_credentials={"username": "a", "password": "secret-token"}) as page:
            give(page, picture())
            page.click("#restore")
            says(page, "Done")


def test_on_a_phone(browser, steps):
    screen = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    with served() as (place, _), page_at(browser, place, **screen) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        give(page, picture())
        page.tap("#restore")
        says(page, "Done")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
