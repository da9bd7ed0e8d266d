"""The gallery in a real browser: what a reader does with it, by mouse, by keyboard and on a phone."""

import contextlib
import io

import numpy as np
import pytest
from browser import launched, needs_chromium
from pictures import coordinates, write
from PIL import Image

from faithdiff_jax.evaluation.comparison import compare
from faithdiff_jax.evaluation.gallery import GalleryOptions, write_gallery
from faithdiff_jax.evaluation.measured import measure

pytestmark = needs_chromium

RED, BLUE = (200, 40, 40), (40, 40, 200)
HOSTILE = '<img src="http://x.invalid" onerror="document.title=1">'


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Three pictures; red is far from the reference, blue is the closer the later the picture's name."""
    folder = tmp_path_factory.mktemp("gallery")
    truth = np.zeros((96, 128, 3), np.uint8)
    truth[...] = BLUE
    methods = {"red": {}, "blue": {}, HOSTILE: {}}
    references = {}
    for number, name in enumerate(("a", "b", HOSTILE)):
        references[name] = write(folder / f"truth{number}.png", truth)
        red = np.zeros_like(truth)
        red[...] = RED
        methods["red"][name] = write(folder / f"red{number}.png", red)
        blue = truth.copy()
        blue[: 40 - 10 * number] = 0
        methods["blue"][name] = write(folder / f"blue{number}.png", blue)
        methods[HOSTILE][name] = write(folder / f"places{number}.png", coordinates(96, 128))
    comparison = compare(methods, references=references)
    measured = measure(comparison, ["psnr", "gmsd"])
    for beside in (False, True):
        options = GalleryOptions(title=HOSTILE, beside=beside)
        write_gallery(folder / f"{beside}.html", comparison, measured, options)
    return folder / "False.html"


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


@contextlib.contextmanager
def opened(browser, file, **screen):
    """The page; at the end no request has left it, and its script has met no error."""
    context = browser.new_context(**(screen or {"viewport": {"width": 1200, "height": 800}}))
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    yield page
    outside = [url for url in requests if not url.startswith(("data:", "file:"))]
    context.close()
    assert outside == errors == []


def colour(page, x, y):
    """Of the stage, at that part of its width and height."""
    shot = page.locator("#stage").screenshot()
    image = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))
    return tuple(int(value) for value in image[int(y * image.shape[0]), int(x * image.shape[1])])


def names(page):
    return page.locator("#list bdi").all_inner_texts()


def choose(page, left, right):
    page.select_option("#left", label=left)
    page.select_option("#right", label=right)


def drag(page, start, end):
    """In parts of the stage's width and height."""
    box = page.locator("#stage").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=4)
    page.mouse.up()


def test_the_slider_is_dragged(browser, page_file):
    with opened(browser, page_file) as page:
        choose(page, "red", "reference")
        assert colour(page, 0.4, 0.3) == RED
        assert colour(page, 0.6, 0.3) == BLUE
        drag(page, (0.5, 0.5), (0.65, 0.5))
        assert colour(page, 0.6, 0.3) == RED
        assert int(page.get_attribute("#handle", "aria-valuenow")) > 60
        page.focus("#handle")
        for _ in range(20):
            page.keyboard.press("ArrowLeft")
        assert colour(page, 0.4, 0.3) == BLUE
        page.keyboard.press("s")
        assert colour(page, 0.4, 0.3) == RED
        page.keyboard.down(" ")
        assert colour(page, 0.4, 0.3) == BLUE
        page.keyboard.up(" ")
        assert colour(page, 0.4, 0.3) == RED


def test_zoom_keeps_the_place(browser, page_file):
    with opened(browser, page_file) as page:
        choose(page, HOSTILE, "red")
        page.keyboard.press("End")
        drag(page, (0.5, 0.9), (0.95, 0.9))  # all of the left one
        box = page.locator("#stage").bounding_box()
        x, y = 0.55, 0.4
        before = colour(page, x, y)
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        page.mouse.wheel(0, -900)
        page.wait_for_timeout(50)
        assert page.inner_text("#zoom") != "100 %"
        after = colour(page, x, y)
        assert abs(after[0] - before[0]) <= 1  # red is the column, green the row
        assert abs(after[1] - before[1]) <= 1
        page.keyboard.press("j")  # the next picture, of the same places
        assert colour(page, x, y) == after
        drag(page, (0.3, 0.5), (0.5, 0.5))  # now the picture moves, to the right
        assert colour(page, x, y)[0] < after[0] - 3
        page.keyboard.press("a")  # all beside one another: the place in the middle stays
        middle = page.evaluate("""() => [...document.querySelectorAll('.pane')].map(pane => {
            const image = pane.querySelector('img'), box = pane.getBoundingClientRect();
            return [(box.width / 2 - parseFloat(image.style.left)) / parseFloat(image.style.width), box.height];
        })""")
        assert len(middle) == 4
        assert np.ptp(np.array(middle), axis=0).max() < 1e-3
        page.click("#fit")
        assert page.is_disabled("#zoom-out")


def test_pictures_are_sorted(browser, page_file):
    with opened(browser, page_file) as page:
        by_name = sorted(["a", "b", HOSTILE])
        assert names(page) == by_name
        page.select_option("#sort-of", label="blue")
        page.select_option("#sort", label="PSNR")
        assert names(page) == ["a", "b", HOSTILE]  # the worst first
        page.click("#direction")
        assert names(page) == [HOSTILE, "b", "a"]
        page.select_option("#sort", label="GMSD")
        falling = names(page)
        page.keyboard.press("Escape")
        page.locator("#stage").press("r")
        assert names(page) == falling[::-1]
        figures = page.locator("#list small").all_inner_texts()
        values = [float(text.split()[-1]) for text in figures]
        assert values == sorted(values)
        assert values[0] < values[-1]
        page.click("#list button >> nth=2")
        assert page.get_attribute("#list button >> nth=2", "aria-current") == "true"
        assert page.inner_text("#name") == names(page)[2]
        best = page.locator("td.best").all_inner_texts()
        assert len(best) >= 2
        page.click("#of-all")
        assert "Mean of 3" in page.inner_text("#figures")


def test_nothing_in_a_name_acts(browser, page_file):
    with opened(browser, page_file) as page:
        assert page.inner_text("h1") == HOSTILE
        assert page.title() == HOSTILE
        for _ in range(3):
            page.keyboard.press("j")
        assert page.locator("img[src^=http]").count() == 0
        assert page.title() == HOSTILE


def test_pictures_beside_the_page_are_found(browser, page_file):
    with opened(browser, page_file.with_name("True.html")) as page:
        choose(page, "red", "reference")
        page.wait_for_function("[...document.querySelectorAll('#stage img')].every(image => image.naturalWidth)")
        assert colour(page, 0.4, 0.3) == RED
        assert colour(page, 0.6, 0.3) == BLUE


def test_on_a_phone_and_in_the_dark(browser, page_file):
    screen = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "color_scheme": "dark"}
    with opened(browser, page_file, **screen) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        background = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(background) == "rgb(21, 24, 28)"
        choose(page, "red", "reference")
        box = page.locator("#stage").bounding_box()
        page.touchscreen.tap(box["x"] + 0.8 * box["width"], box["y"] + 0.5 * box["height"])
        assert int(page.get_attribute("#handle", "aria-valuenow")) == pytest.approx(80, abs=1)
        page.click("#theme")
        assert page.evaluate(background) == "rgb(246, 247, 249)"
        page.click("#mode-tiles")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.locator(".tile").count() == 4
