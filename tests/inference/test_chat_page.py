"""The chat page in headless Chromium (design: serving.md 2).

Skipped where there is no Chromium, which is no Python package; REQUIRE_CHROMIUM=1 makes it fail
instead. SCREENSHOTS=FOLDER keeps the picture of the page.
"""

import importlib.util
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
from mutated_requests import data_url, image_message, text_message
from running_server import NAME, call, complete, running, wait_until

SIZE = {"width": 720, "height": 640}
BROWSERS = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
MOST = 60  # tokens of an answer
GREEDY = {"temperature": 0, "max_tokens": MOST}
# Notes every text that an answer has had, in order, so that a stream can be told from one piece.
WATCH = """
() => {
  window.seen = [];
  new MutationObserver(() => {
    const all = document.querySelectorAll(".assistant span");
    const text = all.length ? all[all.length - 1].textContent : "";
    if (text && text !== seen[seen.length - 1]) seen.push(text);
  }).observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true});
}
"""


def executable() -> str:
    """Returns the path of Chromium; skips without it, or without the package that drives it."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    lacking = "Chromium" if found is None else ""
    lacking = lacking or ("" if importlib.util.find_spec("playwright") else "playwright")
    if not lacking:
        return found
    message = f"the chat page was not opened in a browser: {lacking} is not installed"
    if os.environ.get("REQUIRE_CHROMIUM") == "1":
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="module")
def browser():
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers and root do not have.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser, model):
    engine = model.engine(slots=2, capacity=256, max_tiles=2, waiting=4)
    engine.start()
    with running(lambda: engine) as address:
        wait_until(lambda: call(address, "/health")[0] == 200)
        yield address


@pytest.fixture
def page(browser, address):
    """The page, opened; afterwards nothing may have gone wrong in its script."""
    page, problems = browser.new_page(viewport=SIZE), []
    page.set_default_timeout(30_000)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.route("**/v1/chat/completions", shorten)
    page.goto(f"{address}/")
    page.evaluate(WATCH)
    yield page
    page.close()
    assert not problems


def shorten(route):
    """Bounds an answer, which else fills its slot: a random model seldom stops."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"max_tokens": MOST}))


def ask(page, text: str) -> str:
    """Sends a question; returns the answer when it is whole."""
    before = page.locator(".assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator(".assistant").nth(before).wait_for()
    page.locator("#send").wait_for(state="visible")
    return page.locator(".assistant span").nth(before).text_content()


@pytest.mark.slow
def test_a_streamed_answer_about_an_image(page, address, image, tmp_path):
    page.set_input_files("#file", [image, image])
    page.locator("#pending img").nth(1).click()  # takes the second one back
    assert page.locator("#pending img").count() == 1
    answer = ask(page, "What is stamped?")

    messages = image_message("What is stamped?", data_url(Path(image).read_bytes()))
    status, reply = complete(address, {"model": NAME, "messages": messages, **GREEDY})
    assert status == 200
    assert answer == reply["choices"][0]["message"]["content"] != ""
    pieces = page.evaluate("seen")
    assert len(pieces) >= 3 and pieces[-1] == answer
    assert all(later.startswith(former) for former, later in itertools.pairwise(pieces))
    usage = reply["usage"]
    spent = f"{usage['prompt_tokens']} tokens read, {usage['completion_tokens']} written"
    assert spent in page.locator(".spent").text_content()
    assert page.locator(".user img").evaluate("image => image.naturalWidth") > 0
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "chat_page.png")
    assert (folder / "chat_page.png").stat().st_size > 5000

    again = ask(page, "And now?")  # the chat goes on with both turns
    history = [*messages, {"role": "assistant", "content": answer}, *text_message("And now?")]
    status, reply = complete(address, {"messages": history, **GREEDY})
    assert status == 200 and again == reply["choices"][0]["message"]["content"]


def test_an_error_is_shown_and_the_chat_goes_on(page, address):
    assert "a slot of this server holds 256" in ask(page, "long " * 400)
    assert page.locator(".error").count() == 1
    _, reply = complete(address, {"messages": text_message("Tell me."), **GREEDY})
    assert ask(page, "Tell me.") == reply["choices"][0]["message"]["content"]
    page.click("#reset")
    assert page.locator(".turn").count() == 0
