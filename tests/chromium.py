"""A headless Chromium for tests: the system's, or Playwright's own."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

INSTALL = "`make test-browser` installs it"


@contextmanager
def chromium() -> Iterator["Browser"]:
    """Skips the test where there is none."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no Chromium on this machine: {INSTALL}")
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root otherwise
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()
