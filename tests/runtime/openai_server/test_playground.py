"""The page in a real browser: keyboard, token colours, two lanes, scrolling, errors, phone width."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver import ActionChains, Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from scripts.serving.server_process import KEY, Served
from tests.support.browser import browser, missing_browser
from tests.support.patience import HANG_SECONDS

QUESTION = "What is 60% of 440?"
ANSWER = "10% of 440 is 44. Ones: 4x6=24, carry 2. Tens: 4x6=24, 24+2=26. So 60% of 440 is 264."

# CI sets the variable, so that there a missing browser is a failure.
pytestmark = pytest.mark.skipif(
    missing_browser() is not None and "TRIMODE_NEED_BROWSER" not in os.environ,
    reason=f"{missing_browser()} is not on PATH; `make browser` installs it",
)


@pytest.fixture(scope="module")
def chrome() -> Iterator[Chrome]:
    with browser() as driver:
        yield driver


@pytest.fixture
def page(chrome: Chrome, served: Served) -> Chrome:
    return opened(chrome, served)


def opened(browser: Chrome, served: Served) -> Chrome:
    """The page with the key entered."""
    browser.get(f"{served.url}/")
    WebDriverWait(browser, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "key").is_displayed())
    browser.find_element(By.ID, "key").send_keys(KEY, Keys.ENTER)
    WebDriverWait(browser, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "model").text == "tiny")
    browser.get_log("browser")  # the refusal without the key is in it
    return browser


def press(page: Chrome, *keys: str) -> None:
    """Send keys to the focused element."""
    ActionChains(page).send_keys(*keys).perform()


def focused(page: Chrome) -> str:
    return str(page.execute_script("return document.activeElement.id || document.activeElement.name"))


def go_to(page: Chrome, name: str) -> None:
    """Move the focus by the tab key."""
    for _ in range(20):
        if focused(page) == name:
            return
        press(page, Keys.TAB)
    raise AssertionError(f"no way to {name}")


def ask(page: Chrome, prompt: str) -> None:
    page.find_element(By.ID, "prompt").send_keys(prompt, Keys.ENTER)
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())


def wait_for_rejected_drafts(page: Chrome) -> None:
    """Rejected drafts are shown for a moment after the answer is complete."""
    WebDriverWait(page, HANG_SECONDS).until(lambda page: not page.find_elements(By.CSS_SELECTOR, ".turn .rejected"))


def answers(page: Chrome) -> list[str]:
    """The latest answer of each lane, after rejected drafts have disappeared."""
    wait_for_rejected_drafts(page)
    return [lane.find_elements(By.CLASS_NAME, "turn")[-1].text for lane in page.find_elements(By.CLASS_NAME, "lane")]


def choose(page: Chrome, lane: int, **fields: str) -> None:
    for name, value in fields.items():
        field = page.find_elements(By.CLASS_NAME, "lane")[lane].find_element(By.NAME, name)
        page.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))", field, value
        )


def kinds(page: Chrome) -> set[str]:
    tokens = page.find_elements(By.CSS_SELECTOR, ".turn .token")
    return {token.get_attribute("class").removeprefix("token ") for token in tokens}


def complaints(page: Chrome) -> list[dict[str, Any]]:
    return [entry for entry in page.get_log("browser") if entry["level"] in ("WARNING", "SEVERE")]


def test_a_question_by_keyboard(page: Chrome) -> None:
    ask(page, QUESTION)
    assert answers(page) == [ANSWER]
    assert kinds(page) >= {"prefill", "accepted", "bonus"}
    figures = {figure.get_attribute("data-figure"): figure.text for figure in page.find_elements(By.TAG_NAME, "dd")}
    assert float(figures["speed"]) > 0
    assert float(figures["forward"]) > 1
    assert figures["acceptance"].endswith("%")
    assert complaints(page) == []


def test_keyboard_only(page: Chrome) -> None:
    go_to(page, "mode")
    press(page, Keys.ARROW_DOWN, Keys.TAB, Keys.ARROW_DOWN, Keys.ARROW_DOWN)  # linear_spec to diffusion; block 8
    go_to(page, "prompt")
    press(page, QUESTION)
    go_to(page, "send")
    press(page, Keys.ENTER)
    # Stop is of no use now.
    WebDriverWait(page, HANG_SECONDS).until(lambda page: focused(page) == "prompt")
    assert page.find_elements(By.CLASS_NAME, "turn")[-1].get_attribute("data-who") == "diffusion, block 8"
    assert "denoised" in kinds(page)
    press(page, "Count.", Keys.ENTER)
    assert focused(page) == "prompt"
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())
    assert len(page.find_elements(By.CLASS_NAME, "turn")) == 4


def test_origins_as_text(page: Chrome) -> None:
    ask(page, QUESTION)
    assert answers(page) == [ANSWER]
    last = page.find_elements(By.CSS_SELECTOR, ".talk[role=log] > ol[role=list] > li")[-1]
    text = str(last.get_attribute("textContent"))
    counts = re.fullmatch(r"Tokens: (1) prefill, (\d+) accepted, (\d+) bonus", text)
    assert counts is not None
    shown = len(page.find_elements(By.CSS_SELECTOR, ".turn .token"))
    assert sum(map(int, counts.groups())) == shown + 1  # the end token, which has no text


def test_a_second_question(page: Chrome) -> None:
    ask(page, QUESTION)
    ask(page, "Spell planet and ladder.")
    assert answers(page) == ["planet: p-l-a-n-e-t. ladder: l-a-d-d-e-r."]
    assert len(page.find_elements(By.CLASS_NAME, "turn")) == 4


def test_two_modes_side_by_side(page: Chrome) -> None:
    page.find_element(By.ID, "compare").send_keys(Keys.SPACE)
    choose(page, 0, mode="linear_spec", block_length="8")
    choose(page, 1, mode="ar")
    ask(page, QUESTION)
    assert answers(page) == [ANSWER, ANSWER]
    forward = [float(found.text) for found in page.find_elements(By.CSS_SELECTOR, '[data-figure="forward"]')]
    assert forward[0] > forward[1] == 1.0
    labels = [turn.get_attribute("data-who") for turn in page.find_elements(By.CLASS_NAME, "turn")]
    assert labels == ["you", "linear_spec, block 8", "you", "ar"]


def test_denoised_tokens_have_their_own_colour(page: Chrome) -> None:
    choose(page, 0, mode="diffusion", block_length="8")
    ask(page, QUESTION)
    assert "denoised" in kinds(page)


STORY = "Write a short story about Milo, who finds 37 stones and later 90 more."
# Of each cycle that is drawn: its words, its reason, and its tokens as (text, kind, row, column).
DRAWN = """
return [...document.querySelectorAll(".cycles li")].map((item) => {
  const [words, reason] = item.querySelectorAll("div");
  const tokens = [...item.querySelectorAll(".drafts > .token")].map((token) => [
    token.textContent, token.classList[1], Number(token.style.gridRowStart), Number(token.style.gridColumnStart),
  ]);
  return { words: words.textContent, reason: reason.textContent, tokens };
});
"""


def shown_text(page: Chrome) -> str:
    """The latest answer with its white space, after rejected drafts have disappeared."""
    wait_for_rejected_drafts(page)
    return str(page.execute_script("return [...document.querySelectorAll('.turn')].at(-1).textContent"))


def test_cycles_show_the_branches_of_trees_and_the_accepted_path(page: Chrome) -> None:
    choose(page, 0, mode="linear_spec", tree_width="32")
    ask(page, STORY)
    assert page.find_elements(By.CLASS_NAME, "turn")[-1].get_attribute("data-who") == "linear_spec, tree 32"
    assert page.execute_script(DRAWN) == []  # until it is opened
    page.find_element(By.CSS_SELECTOR, ".cycles summary").click()
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.execute_script(DRAWN))
    cycles = page.execute_script(DRAWN)
    assert page.find_element(By.CSS_SELECTOR, ".cycles summary").text == f"{len(cycles)} cycles"
    text, branches = "", 0
    for cycle in cycles:
        assert re.fullmatch(r"draft pass, block \d+, tree of \d+: \d+ tokens?, \d+\.\d expected", cycle["words"])
        assert cycle["reason"] == "set by the request"
        tokens = cycle["tokens"]
        assert tokens[0][1:] == ["prefill", 1, 1]
        path = [token for token in tokens if token[1] in ("accepted", "bonus")]
        assert [column for *_, column in path] == list(range(2, 2 + len(path)))  # each token after the one before it
        assert [row for _, _, row, _ in tokens] == sorted(row for _, _, row, _ in tokens)
        text += "".join([tokens[0][0], *(token[0] for token in path[:-1])])
        branches += len({row for _, kind, row, _ in tokens if kind != "bonus"}) - 1
    assert branches > 0
    assert shown_text(page).startswith(text.replace("\u23ce", "\n"))
    assert complaints(page) == []


def test_cycles_of_auto_show_why(page: Chrome) -> None:
    choose(page, 0, mode="auto", block_length="8")
    ask(page, STORY)
    page.find_element(By.CSS_SELECTOR, ".cycles summary").click()
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.execute_script(DRAWN))
    for cycle in page.execute_script(DRAWN):
        assert re.search(r"block [1248] is expected to be fastest, [\d,]+ tokens/s", cycle["reason"])
    titles = [str(token.get_attribute("title")) for token in page.find_elements(By.CSS_SELECTOR, ".turn .token")]
    assert titles[0] == "prefill"
    assert all(re.match(r"\w+\ncycle \d+: (no drafts|draft pass, block \d)", title) for title in titles[1:])
    numbers = [int(title.split("cycle ")[1].split(":")[0]) for title in titles[1:]]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1


def test_open_cycles_grow_while_the_answer_arrives(page: Chrome) -> None:
    page.execute_script(PAUSED)
    choose(page, 0, mode="ar", temperature="1")
    page.find_element(By.ID, "prompt").send_keys("y", Keys.ENTER)
    WebDriverWait(page, HANG_SECONDS, 0.02).until(lambda page: page.find_elements(By.CSS_SELECTOR, ".cycles summary"))
    page.find_element(By.CSS_SELECTOR, ".cycles summary").click()
    WebDriverWait(page, HANG_SECONDS, 0.02).until(lambda page: page.execute_script("return !!window.goOn"))
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.execute_script(DRAWN))
    before = len(page.execute_script(DRAWN))
    page.execute_script("window.goOn()")
    WebDriverWait(page, HANG_SECONDS, 0.02).until(lambda page: len(page.execute_script(DRAWN)) > before + 20)
    press(page, Keys.ESCAPE)
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())


def test_diffusion_has_no_cycles_to_show(page: Chrome) -> None:
    choose(page, 0, mode="diffusion", block_length="8")
    ask(page, QUESTION)
    assert page.find_elements(By.CLASS_NAME, "cycles") == []
    titles = {token.get_attribute("title") for token in page.find_elements(By.CSS_SELECTOR, ".turn .token")}
    assert titles == {"prefill", "denoised", "bonus"}


def test_rejected_drafts_are_shown_briefly(page: Chrome) -> None:
    page.execute_script(
        "window.flashed = 0; new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach("
        "(node) => { window.flashed += node.className === 'token rejected'; })))"
        ".observe(document.querySelector('.talk'), { childList: true, subtree: true })"
    )
    choose(page, 0, mode="linear_spec", block_length="32")
    ask(page, STORY)
    assert answers(page)
    assert page.execute_script("return window.flashed") > 0


def test_reasoning_is_marked(page: Chrome) -> None:
    page.find_element(By.NAME, "thinking").click()
    ask(page, QUESTION)
    (answer,) = answers(page)
    assert "think" not in answer
    assert page.find_elements(By.CSS_SELECTOR, ".turn .thought")
    assert page.find_elements(By.CSS_SELECTOR, ".turn .token:not(.thought)")


# Answers without an end of their own, and too many to be done soon; of which the page is shown little.
ENDLESS = """
const ask = window.fetch;
window.fetch = async (url, { body, ...options }) => {
  const response = await ask(url, { ...options, body: body.replace("{", '{"ignore_eos":true,"n":64,') });
  let shown = 0;
  const few = { transform: (part, stream) => { if (shown++ < 3) stream.enqueue(part); } };
  return new Response(response.body.pipeThrough(new TransformStream(few)));
};
"""


def test_escape_stops_and_the_slot_is_free(page: Chrome, served: Served) -> None:
    page.execute_script(ENDLESS)
    choose(page, 0, mode="ar", temperature="1")
    whole = served.metrics()["trimode_answers_total"]
    page.find_element(By.ID, "prompt").send_keys("y", Keys.ENTER)
    WebDriverWait(page, HANG_SECONDS, 0.02).until(lambda page: page.find_element(By.ID, "stop").is_enabled())
    page.find_element(By.ID, "prompt").send_keys(Keys.ESCAPE)
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())
    served.wait_until_idle(HANG_SECONDS)
    assert served.metrics()["trimode_answers_total"] == whole  # which one that was stopped is not


def test_text_is_never_markup(page: Chrome) -> None:
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    ask(page, hostile)
    assert page.find_elements(By.CSS_SELECTOR, ".turn")[0].text == hostile
    assert page.find_elements(By.CSS_SELECTOR, "img, .turn script") == []
    assert complaints(page) == []


def test_a_refused_prompt_is_kept(page: Chrome) -> None:
    choose(page, 0, mode="linear_spec")
    page.execute_script("document.getElementById('prompt').value = 'long '.repeat(3000)")
    ask(page, "x")
    assert "maximum context length" in page.find_element(By.CSS_SELECTOR, ".turn .error").text
    assert page.find_element(By.ID, "prompt").get_property("value").startswith("long long")  # to be mended
    page.find_element(By.ID, "prompt").clear()
    ask(page, QUESTION)
    assert answers(page) == [ANSWER]  # the refused prompt is not part of the conversation
    assert page.find_element(By.ID, "prompt").get_property("value") == ""


def test_a_missing_or_wrong_key_is_explained(chrome: Chrome, served: Served) -> None:
    chrome.get(f"{served.url}/")
    notice = chrome.find_element(By.ID, "notice")
    WebDriverWait(chrome, HANG_SECONDS).until(lambda _: notice.text == "This server needs an API key. Enter it above.")
    ask(chrome, QUESTION)
    assert chrome.find_element(By.ID, "prompt").get_property("value") == QUESTION
    chrome.find_element(By.ID, "key").send_keys("wrong", Keys.ENTER)
    WebDriverWait(chrome, HANG_SECONDS).until(lambda _: notice.text == "The API key is wrong. Enter another one.")
    chrome.find_element(By.ID, "key").clear()
    chrome.find_element(By.ID, "key").send_keys(KEY, Keys.ENTER)
    WebDriverWait(chrome, HANG_SECONDS).until(lambda _: notice.text == "")
    press(chrome, Keys.TAB)
    chrome.find_element(By.ID, "prompt").send_keys(Keys.ENTER)
    WebDriverWait(chrome, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())
    assert answers(chrome) == [ANSWER]


PAGE_FITS = "return document.documentElement.scrollHeight <= innerHeight"
SCROLL = "const talk = document.querySelector('.talk'); "


def fill(page: Chrome) -> None:
    """Make a conversation that is longer than its box."""
    for number in range(6):
        ask(page, f"What is {number + 1}0% of 440?")
    assert page.execute_script(SCROLL + "return talk.scrollHeight > talk.clientHeight")


def test_a_long_conversation_scrolls_in_its_own_box(page: Chrome) -> None:
    fill(page)
    assert page.execute_script(PAGE_FITS)
    assert page.execute_script(SCROLL + "return talk.scrollHeight - talk.scrollTop - talk.clientHeight < 2")
    page.execute_script(SCROLL + "talk.scrollTop = 10")
    page.find_element(By.ID, "compare").click()
    assert page.execute_script(SCROLL + "return talk.scrollTop") == 10
    assert page.execute_script(PAGE_FITS)


# A long answer that arrives in full only when the test calls goOn, however late the test is.
PAUSED = r"""
const ask = window.fetch;
window.fetch = async (url, { body, ...options }) => {
  const response = await ask(url, { ...options, body: body.replace("{", '{"ignore_eos":true,') });
  const [decoder, encoder] = [new TextDecoder(), new TextEncoder()];
  let shown = 0;
  const paused = { transform: async (part, stream) => {
    for (const event of decoder.decode(part, { stream: true }).split(/(?<=\n\n)/)) {
      if (shown++ === 5) await new Promise((goOn) => { window.goOn = goOn; });
      stream.enqueue(encoder.encode(event));
    }
  } };
  return new Response(response.body.pipeThrough(new TransformStream(paused)));
};
"""


def test_reading_back_while_text_arrives(page: Chrome) -> None:
    fill(page)
    page.execute_script(PAUSED)
    choose(page, 0, mode="ar", temperature="1")
    page.find_element(By.ID, "prompt").send_keys("y", Keys.ENTER)

    def tokens() -> int:
        # The last turn, not the last child: its summary follows it when it has ended, which may be at any time.
        last = "[...document.querySelectorAll('.turn')].at(-1)"
        return int(page.execute_script(f"return {last}.querySelectorAll('.token').length"))

    WebDriverWait(page, HANG_SECONDS, 0.02).until(
        lambda _: tokens() > 0 and page.execute_script("return !!window.goOn")
    )
    page.execute_script(SCROLL + "talk.scrollTop = 10")
    before = tokens()
    page.execute_script("window.goOn()")
    WebDriverWait(page, HANG_SECONDS, 0.02).until(lambda _: tokens() > before + 20)
    assert page.execute_script(SCROLL + "return talk.scrollTop") == 10
    press(page, Keys.ESCAPE)
    WebDriverWait(page, HANG_SECONDS).until(lambda page: page.find_element(By.ID, "send").is_enabled())


def test_a_new_chat(page: Chrome) -> None:
    ask(page, QUESTION)
    page.execute_script(CUT.replace('.replace("data: [DONE]\\n\\n", "")', ""))
    page.find_element(By.ID, "new-chat").click()
    assert page.find_elements(By.CLASS_NAME, "turn") == []
    assert focused(page) == "prompt"
    ask(page, QUESTION)
    assert answers(page) == [ANSWER]
    assert page.execute_script("return window.lengths") == [1]


def test_a_second_lane_says_that_it_has_no_history(page: Chrome) -> None:
    page.find_element(By.ID, "compare").click()
    assert page.find_elements(By.CLASS_NAME, "note") == []  # neither has the first
    page.find_element(By.ID, "compare").click()
    ask(page, QUESTION)
    page.find_element(By.ID, "compare").click()
    lane = page.find_elements(By.CLASS_NAME, "lane")[1]
    assert lane.find_element(By.CLASS_NAME, "note").text == "This lane starts without the conversation so far."
    ask(page, "Spell planet and ladder.")
    assert answers(page) == ["planet: p-l-a-n-e-t. ladder: l-a-d-d-e-r."] * 2


CUT = """
const ask = window.fetch;
window.lengths = [];
window.fetch = async (url, options) => {
  const response = await ask(url, options);
  if (!options?.body) return response;
  window.lengths.push(JSON.parse(options.body).messages.length);
  return new Response((await response.text()).replace("data: [DONE]\\n\\n", ""));
};
"""


def test_a_broken_stream_does_not_enter_the_conversation(page: Chrome) -> None:
    page.execute_script(CUT)
    ask(page, QUESTION)
    assert answers(page) == [f"{ANSWER} The connection was lost."]
    ask(page, QUESTION)
    assert page.execute_script("return window.lengths") == [1, 1]  # nothing of it is in the history


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_can_be_read(served: Served, dark: bool) -> None:
    with browser(width=390, height=844, dark=dark) as page:
        opened(page, served)
        page.find_element(By.ID, "compare").click()
        ask(page, QUESTION)
        assert answers(page) == [ANSWER, ANSWER]
        assert page.execute_script(IN_SIGHT, "#prompt, #send, #stop, .figures, .talk")
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        assert page.execute_script(PAGE_FITS)
        page.execute_script("document.getElementById('key-field').hidden = true")
        assert page.execute_script("return document.querySelector('header').offsetHeight") < 48  # one line
        for kind in ("prefill", "accepted", "bonus", "denoised", "forced", "rejected"):
            assert page.execute_script(CONTRAST, f"#legend .{kind}") >= 4.5  # WCAG AA


IN_SIGHT = """
return [...document.querySelectorAll(arguments[0])].every((element) => {
  const { height, right, bottom } = element.getBoundingClientRect();
  return height > 20 && right <= innerWidth && bottom <= innerHeight;
});
"""
CONTRAST = """
const style = getComputedStyle(document.querySelector(arguments[0]));
const light = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
};
const [a, b] = [light(style.color), light(style.backgroundColor)];
return Math.max(a, b) / Math.min(a, b);
"""
