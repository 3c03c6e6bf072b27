"""The page in a real browser, over a backend whose titles are Chinese, Arabic and hostile."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from shelf import Shelf

from serve.api import create_api

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
    "--dump-dom",
]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@contextmanager
def served(shelf: Shelf) -> Iterator[str]:
    config = uvicorn.Config(create_api(shelf, 64, 5.0), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Shelf()) as url:
        yield url


def rendered(url: str, profile: Path, language: str = "en-US") -> str:
    """The document after its scripts have run."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", f"--lang={language}", f"--accept-lang={language}", url]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60, check=True).stdout


def test_the_first_user_is_shown_at_once(address, tmp_path):
    page = rendered(address, tmp_path)
    assert '<option value="ann">' in page and '<option value="安">' in page
    assert "Based on what this user did." in page
    assert page.count('class="item"') == 3  # k is 10, the catalogue has 3
    assert re.search(r'<span class="rank">1</span><span class="title" dir="auto">霸王别姬</span>', page)
    assert re.search(r'<span class="title" dir="auto">المومياء</span><time[^>]*>4 Dec 1997</time>', page)
    assert 'aria-label="Weights of the views: id 25%, text 75%"' in page
    assert "shelf-1" in page


def test_a_title_is_never_markup(address, tmp_path):
    page = rendered(address, tmp_path)
    assert '<label id="locked" hidden' in page
    assert "&lt;script&gt;document.title='broken'&lt;/script&gt;" in page
    assert "<title>MVRec</title>" in page


def test_an_unknown_user_in_chinese(address, tmp_path):
    page = rendered(f"{address}/?user=%3Cb%3Enobody", tmp_path, "zh-CN")
    assert '<html lang="zh-CN">' in page
    assert "大家都喜欢的热门物品" in page and "对该用户暂时一无所知" in page
    assert page.count('class="item"') == 3


def test_a_service_with_keys_asks_for_one_and_says_so(tmp_path):
    shelf = Shelf()
    shelf.keys = ["a-key-of-letters-1"]
    with served(shelf) as url:
        page = rendered(url, tmp_path)
    assert "a key is needed" in page and page.count('class="item"') == 0
    assert '<label id="locked"><span data-word="key">Key</span>' in re.sub(r"\s*\n\s*", "", page)


def test_docs(address, tmp_path):
    page = rendered(f"{address}/docs", tmp_path)
    assert page.count('class="card route"') == 13
    assert "/v1/recommend" in page and "exclude_seen" in page
