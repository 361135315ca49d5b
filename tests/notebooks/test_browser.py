"""A lesson in JupyterLab, as a learner meets it: it opens, all its cells run, a slider moves and its figure changes.

By hand: `pip install -e '.[browser]' && pytest -m browser`, with a Chromium on the path.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSON = "03_kv_cache"
PATIENCE = 600  # seconds for a lesson on a slow machine
LAB = (
    *("--no-browser", "--ServerApp.token=", "--ServerApp.password=", "--LabApp.news_url="),
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
)
CHROMIUM = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(prompt => prompt.textContent)"
PICTURE = ".jupyter-widgets.widget-image"


def chromium() -> str:
    """Where the browser is; the test is skipped, with the reason, where something it needs is missing."""
    missing = [name for name in ("playwright", "jupyterlab") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install -e '.[browser]'")
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium on the path")


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    command = [sys.executable, "-m", "jupyterlab", *LAB, *root, f"--port={port}", f"--ServerApp.root_dir={folder}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait_for(f"{address}/api/status")
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(address: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    pytest.fail("JupyterLab did not start within a minute")


def run_all(page: Any) -> None:
    """Run > Run All Cells once the kernel is there, and wait until no cell is left to run."""
    page.locator("#jp-main-statusbar", has_text="| Idle").wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()
    page.wait_for_function(f"{PROMPTS}.some(text => text.includes('*'))")
    page.wait_for_function(f"{PROMPTS}.every(text => !text.includes('*'))", timeout=1000 * PATIENCE)


@pytest.mark.browser
def test_a_lesson_runs_and_its_slider_moves_a_figure(tmp_path: Path) -> None:
    browser_path = chromium()
    from playwright.sync_api import sync_playwright

    shutil.copy(NOTEBOOKS / f"{LESSON}.ipynb", tmp_path)
    with lab(tmp_path) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(CHROMIUM))
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(120_000)
        page.goto(f"{address}/lab/tree/{LESSON}.ipynb?reset")
        page.locator(".jp-NotebookPanel").wait_for()
        run_all(page)
        assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
        handle = page.locator(".noUi-handle").first
        handle.wait_for(state="attached")
        handle.scroll_into_view_if_needed()
        before = page.locator(PICTURE).first.get_attribute("src")
        handle.focus()
        page.keyboard.press("ArrowRight")
        changed = "([selector, before]) => document.querySelector(selector).src !== before"
        page.wait_for_function(changed, arg=[PICTURE, before])
        page.screenshot(path=tmp_path / "lesson.png")
        browser.close()
    assert (tmp_path / "lesson.png").stat().st_size > 20_000
