"""The page in a real Chromium, over a replica with two versions of a real model."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from serve.alias import publish
from serve.app import Replica

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
NEW = {"item_id": "电影/一号", "features": {"title": "<b>功夫</b> & <script>document.title='broken'</script>"}}
PHONE = {"width": 360, "height": 780}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """Its address."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def address(plain_checkpoint: Path, other_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("page")
    publish(plain_checkpoint, directory / "shop.json")
    publish(other_checkpoint, directory / "shop.json", 0.25)
    replica = Replica(str(directory / "shop.json"), {"state_dir": str(directory / "state")})
    with served(replica.__serve_build_asgi_app__()) as started:
        httpx.put(f"{started}/v1/items", json={"items": [NEW]}).raise_for_status()
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=20_000)  # a machine may be busy
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Browser, address: str) -> Iterator[Callable[..., Page]]:
    """Opens the page for a user, in a window of its own; a script that fails there fails the test."""
    contexts, errors = [], []

    def opened(user: str | None = None, at: str = address, locale: str = "en-US", **options: Any) -> Page:
        contexts.append(browser.new_context(base_url=at, locale=locale, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(error))
        page.goto("/" if user is None else f"/?user={user}")
        explained(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []


def explained(page: Page) -> None:
    expect(page.locator("#first .why:enabled").first).to_be_visible()


def names(place: Page | Locator, inside: str = "#first .head") -> list[str]:
    return place.locator(f"{inside} .title").all_text_contents()


def recommended(page: Page, **body: Any) -> dict[str, Any]:
    answer = page.request.post("/v1/recommend", data=body)
    assert answer.ok
    return answer.json()


def titles(answer: dict[str, Any]) -> list[str]:
    return [item["display"] or item["item_id"] for item in answer["items"]]


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def choose(page: Page, versions: list[str]) -> None:
    """Compares two versions."""
    page.get_by_role("combobox", name="Model version", exact=True).select_option(versions[0])
    page.get_by_role("combobox", name="Compare with", exact=True).select_option(versions[1])
    expect(page.locator("#second .why:enabled").first).to_be_visible()


def version_names(page: Page) -> list[str]:
    return [one["model_version"] for one in page.request.get("/v1/versions").json()["versions"]]


def test_the_first_user_is_shown_at_once(open_page):
    page = open_page()
    assert page.get_by_role("combobox", name="User", exact=True).input_value() == "u000"
    answer = recommended(page, user_id="u000", explain=True)
    assert names(page) == titles(answer) and len(answer["items"]) == 10
    weights = ", ".join(f"{view} {round(100 * share)}%" for view, share in sorted(answer["items"][0]["views"].items()))
    assert page.get_by_role("img", name=f"Weights of the views: {weights}", exact=True).count() >= 1
    assert page.locator("#first .bar > span").count() == 10 * len(answer["items"][0]["views"])
    past = page.request.get("/v1/users/u000/history").json()["events"]
    assert names(page, "#history") == titles({"items": past})
    assert "Based on what this user did." in page.locator("#first").inner_text()
    assert page.locator("#model").inner_text() == answer["model_version"]


def test_users_are_suggested_as_one_types(open_page):
    page = open_page()
    page.get_by_role("combobox", name="User", exact=True).fill("u09")
    expect(page.locator("#users option")).to_have_count(10)
    assert page.locator("#users option").first.get_attribute("value") == "u090"
    page.get_by_role("combobox", name="User", exact=True).fill("u092")
    page.get_by_role("button", name="Recommend").click()
    expect(page).to_have_url("/?user=u092")
    explained(page)
    assert names(page) == titles(recommended(page, user_id="u092"))


def test_an_item_that_is_clicked_changes_the_list(open_page):
    page = open_page("u010")
    before = names(page)
    page.get_by_role("button", name=f"Add to the history: {before[4]}", exact=True).click()
    expect(status(page)).to_contain_text(f"Added: {before[4]}. New in the list:")
    after = names(page)
    assert after == titles(recommended(page, user_id="u010")) and before[4] not in after
    newest = page.locator("#history li:has(.title)").first
    assert newest.locator(".title").inner_text() == before[4] and "live" in newest.inner_text()
    marks = dict(zip(after, page.locator("#first .move").all_inner_texts(), strict=True))
    fresh = [name for name in after if name not in before]
    assert fresh and all(marks[name] == "new" for name in fresh)
    for name in set(after) & set(before):
        steps = before.index(name) - after.index(name)
        assert marks[name].startswith("=" if not steps else f"{'▲' if steps > 0 else '▼'} {abs(steps)}")


def test_somebody_unknown_gets_a_list_of_their_own_by_the_first_click(open_page):
    page = open_page("新客户")
    assert "Popular with everybody" in page.locator("#first").inner_text()
    assert "Nothing is known about this user yet." in page.locator("#history").inner_text()
    page.locator("#first .add").first.click()
    expect(page.locator("#first .rung")).to_contain_text("Based on what this user did.")
    assert page.locator("#history .events li").count() == 1


def test_why(open_page):
    page = open_page("u020")
    item = recommended(page, user_id="u020", explain=True)["items"][0]
    button = page.get_by_role("button", name=f"Why {item['display']}", exact=True)
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    panel = page.locator("#first .panel")
    others = ["all other events"] if abs(item["others"]) >= 0.005 else []
    assert names(panel, ".reasons") == [*titles({"items": item["events"]}), *others]
    told = [float(text.replace("−", "-")) for text in panel.locator(".reasons strong").all_inner_texts()]
    assert told[: len(item["events"])] == [round(event["score"], 2) for event in item["events"]]
    assert item["baseline"] + sum(told) == pytest.approx(item["score"], abs=0.05)  # each is rounded
    for view, rank in item["ranks"].items():
        assert f"without {view}: rank {rank}" in panel.inner_text()
    button.click()
    expect(panel).to_have_count(0)


def test_all_of_it_by_keyboard(open_page):
    page = open_page("u030")

    def tab_to(found: Locator) -> None:
        for _ in range(60):
            page.keyboard.press("Tab")
            if found.evaluate("found => found === document.activeElement"):
                return
        raise AssertionError("not reached by Tab")

    tab_to(page.get_by_role("combobox", name="User", exact=True))
    page.keyboard.press("Control+a")
    page.keyboard.type("u031")
    page.keyboard.press("Enter")
    expect(page).to_have_url("/?user=u031")
    explained(page)
    first = names(page)[0]
    tab_to(page.locator("#first .why").first)
    page.keyboard.press("Enter")
    expect(page.locator("#first .reasons")).to_be_visible()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect(status(page)).to_contain_text(f"Added: {first}.")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == f"Add to the history: {names(page)[0]}"


def test_two_versions_side_by_side(open_page):
    page = open_page("u040")
    versions = version_names(page)
    assert page.get_by_role("combobox", name="Compare with", exact=True).locator("option").all_inner_texts() == [
        "nothing",
        f"{versions[0]} (75% of users)",
        f"{versions[1]} (25% of users)",
    ]
    choose(page, versions)
    left, right = (titles(recommended(page, user_id="u040", model_version=version)) for version in versions)
    assert names(page) == left != right == names(page, "#second .head")
    assert page.get_by_role("heading", name=f"Recommendations by {versions[1]}").is_visible()
    assert page.locator("#first .fresh").count() == len(set(left) - set(right))
    assert page.locator("#second .fresh").all_inner_texts() == ["only here"] * len(set(right) - set(left))
    both = [name for name in right if name in left]
    same = sum(left.index(name) == right.index(name) for name in both)
    expect(status(page)).to_have_text(f"{len(both)} of 10 items are in both lists, {same} of them at the same rank.")
    page.get_by_role("combobox", name="Compare with", exact=True).select_option("")
    expect(page.locator("#second")).to_be_hidden()
    assert page.locator("#model").inner_text() == versions[0]


def test_similar_items(open_page):
    page = open_page("u050")
    page.locator("#first .similar").first.click()
    expect(page.locator("#first .neighbours li")).to_have_count(5)
    page.locator("#first .neighbours .add").nth(1).click()
    expect(status(page)).to_contain_text("Added: ")


def test_a_chinese_id_and_a_title_that_looks_like_markup(open_page):
    page = open_page("u060")
    page.get_by_role("combobox", name="How many", exact=True).select_option("50")  # more than there are: all
    shown = NEW["features"]["title"]
    row = page.locator("#first .item", has=page.get_by_text(shown, exact=True))
    row.get_by_role("button", name=f"Why {shown}", exact=True).click()
    assert NEW["item_id"] in row.locator(".panel").inner_text()
    row.locator(".add").click()
    expect(status(page)).to_contain_text(f"Added: {shown}.")
    assert names(page, "#history")[0] == shown
    assert page.request.get("/v1/users/u060/history").json()["events"][0]["item_id"] == NEW["item_id"]
    assert page.title() == "MVRec" and page.locator("main b").count() == 0


def test_chinese_and_english(open_page):
    page = open_page("u070", locale="zh-CN")
    assert page.locator("html").get_attribute("lang") == "zh-CN"
    assert page.get_by_role("heading", name="推荐结果").is_visible()
    assert "依据该用户的行为记录。点击物品" in page.locator("#first .rung").inner_text()
    page.get_by_role("button", name="为何推荐").first.click()
    assert "目前排第 1 位" in page.locator("#first .panel").inner_text()
    name = names(page)[0]
    page.locator("#first .add").first.click()
    expect(status(page)).to_contain_text(f"已加入：{name}。新出现")
    page.get_by_role("button", name="English").click()
    expect(status(page)).to_contain_text(f"Added: {name}.")
    page.reload()
    explained(page)
    assert page.get_by_role("heading", name="Recommendations").is_visible()
    assert page.locator("html").get_attribute("lang") == "en-GB"


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_nothing_is_wider_than_a_phone(open_page, locale):
    page = open_page("u080", locale=locale, viewport=PHONE, has_touch=True, is_mobile=True)
    versions = version_names(page)
    page.locator("#version").select_option(versions[1])
    page.locator("#other").select_option(versions[0])
    expect(page.locator("#second .why:enabled").first).to_be_visible()
    page.locator("#first .why").first.tap()
    page.locator("#second .similar").first.tap()
    expect(page.locator("#second .neighbours li")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    wide = "found => found.filter(one => one.getBoundingClientRect().right > innerWidth).length"
    assert page.locator("main *:visible").evaluate_all(wide) == 0
    low = "found => found.filter(one => one.getBoundingClientRect().height < 40).length"
    assert page.locator("main button:visible").evaluate_all(low) == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_in_dark(open_page, scheme):
    page = open_page("u081", color_scheme=scheme)
    choose(page, version_names(page))
    page.locator("#second .why").last.click()
    weak = page.locator("body *:visible").evaluate_all(
        """found => {
          const light = (colour) => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
            const [r, g, b] = parts.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const behind = (one) => {
            const { backgroundColor } = getComputedStyle(one);
            return /, 0\\)$/.test(backgroundColor) ? behind(one.parentElement) : backgroundColor;
          };
          const says = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
          return found.filter(says).filter((one) => {
            const [low, high] = [light(getComputedStyle(one).color), light(behind(one))].sort((a, b) => a - b);
            return (high + 0.05) / (low + 0.05) < 4.5;
          }).map((one) => one.outerHTML);
        }"""
    )
    assert weak == []


def test_what_goes_wrong_is_said(open_page):
    page = open_page("长" * 300)
    page.locator("#first .add").first.click()
    expect(status(page)).to_have_text("The service refuses this: 'user_id': expected at most 256 characters, found 300")
    assert page.locator("#first .item").count() == 10  # the list stays
    page.context.set_offline(True)
    page.get_by_role("button", name="Recommend").click()
    expect(status(page)).to_have_text("The service cannot be reached; try again in a moment.")
    assert page.locator("#first .item").count() == 0
    page.context.set_offline(False)
    page.get_by_role("button", name="Recommend").click()
    explained(page)
    expect(status(page)).to_have_text("")


def test_without_the_store_the_page_says_what_is_missing(open_page, plain_checkpoint):
    replica = Replica(str(plain_checkpoint), {"redis_url": "redis://127.0.0.1:1/0"})
    with served(replica.__serve_build_asgi_app__()) as alone:
        page = open_page("u000", at=alone)
        assert page.locator("#versions").is_hidden()  # there is one
        assert "What the user did of late cannot be read now." in page.locator("#first .rung").inner_text()
        page.locator("#first .add").first.click()
        expect(status(page)).to_have_text("What users do cannot be stored now; try again in a moment.")


def test_docs(open_page):
    page = open_page()
    page.get_by_role("link", name="API").click()
    routes = page.request.get("/openapi.json").json()["paths"]
    expect(page.locator(".card.route")).to_have_count(sum(len(verbs) for verbs in routes.values()))
    assert "/v1/recommend" in page.locator("main").inner_text()


def test_a_service_that_asks_for_a_key(browser, plain_checkpoint, tmp_path):
    (tmp_path / "keys").write_text("a-key-of-letters-1\n", encoding="utf-8")
    replica = Replica(str(plain_checkpoint), {"state_dir": str(tmp_path), "api_keys": str(tmp_path / "keys")})
    with served(replica.__serve_build_asgi_app__()) as locked, browser.new_context(base_url=locked) as context:
        page = context.new_page()
        page.goto("/?user=u000")
        expect(status(page)).to_have_text("The service asks for a key.")
        page.get_by_label("Key", exact=True).fill("a-key-of-letters-1")
        page.keyboard.press("Enter")
        explained(page)
        expect(status(page)).to_have_text("")
        expect(page.locator("#users option")).to_have_count(1)  # u000, as it is typed
