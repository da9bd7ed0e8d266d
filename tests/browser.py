"""A real browser for tests of pages: chromium, driven by playwright; without either, its tests are skipped."""

import contextlib
import shutil

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra browser)")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH (Debian: apt-get install chromium)")


@contextlib.contextmanager
def launched():
    """The browser, until the block ends; without the sandbox, which containers do not allow: the pages are our own."""
    with playwright.sync_playwright() as programs:
        started = programs.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()
