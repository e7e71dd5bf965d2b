"""One browser for the tests of a file."""

import pytest
from playwright.sync_api import sync_playwright

from tests.support.live import browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    path = browser.find_chromium()
    if path is None and not browser.REQUIRED:
        pytest.skip(browser.HOW)
    assert path is not None, browser.HOW
    said = tmp_path_factory.mktemp("microphone") / "said.wav"
    browser.microphone_gets(said)
    with sync_playwright() as driver:
        flags = [*browser.FLAGS, f"--use-file-for-fake-audio-capture={said}"]
        started = driver.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()
