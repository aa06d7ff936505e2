"""The page in Chromium: typed, clicked, filtered, by the keyboard alone, on a phone, in dark and light."""

import re
import shutil
import threading

import pytest

pytest.importorskip("starlette", reason="needs the extra 'serve'")
pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
pytest.importorskip("playwright", reason="needs playwright")

import uvicorn
from gallery_in_memory import GalleryInMemory, jpeg
from playwright.sync_api import expect, sync_playwright

from upperson.search.page import listen
from upperson.search.page.app import make_app

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, such as Debian's package chromium"),
]

OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

PATIENCE = 30_000  # ms; a busy machine is slow
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server():
    """The address of a server of the page in a thread."""
    with listen(port=0) as opened:
        config = uvicorn.Config(make_app(GalleryInMemory()), log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium, server):
    """browse(path, **options) is a page in a window of its own. Its errors and requests to others fail the test."""
    contexts, problems = [], []

    def browse(path="/", **options):
        context = chromium.new_context(base_url=server, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(server) or problems.append(request.url))
        page.on("console", lambda line: "Content Security Policy" in line.text and problems.append(line.text))
        page.goto(path)
        return page

    yield browse
    for context in contexts:
        context.close()
    assert not problems


def alts(page):
    return [picture.get_attribute("alt") for picture in page.locator(".card img").all()]


def focused(page):
    return page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')")


def test_type_see_click_and_go_back(browse):
    page = browse()
    expect(page.locator(".card")).to_have_count(24)
    page.keyboard.type("a red coat")  # the field has the focus at first
    page.keyboard.press("Enter")
    expect(page.locator(".count")).to_contain_text("24 of 32 images, the most similar first")
    expect(page.get_by_role("status")).to_contain_text("24 of 32 images")  # read out by screen readers
    expect(page).to_have_url(re.compile(r"/\?q=a\+red\+coat$"))
    expect(page).to_have_title(re.compile("^a red coat – "))
    expect(page.locator("#q")).to_be_focused()
    found = alts(page)
    assert page.evaluate("[...document.querySelectorAll('.card img')].slice(0, 3).every(image => image.decode())")

    page.locator("a.picture").nth(2).click()
    expect(page.locator(".tag")).to_contain_text(f"similar to {found[2]}")
    expect(page.locator(".card").first.locator(".similarity")).to_contain_text("1.000")
    expect(page.locator("#results")).to_be_focused()
    assert alts(page)[0] == found[2]
    expect(page.locator("#q")).to_have_value("")

    page.go_back()
    expect(page.locator("#q")).to_have_value("a red coat")
    assert alts(page) == found
    page.reload()
    assert alts(page) == found


def test_an_example(browse):
    page = browse()
    page.get_by_role("link", name="a person in a red jacket").click()
    expect(page.locator("#q")).to_have_value("a person in a red jacket")
    expect(page.locator(".rank").first).to_have_text("1")
    expect(page.locator(".examples")).to_have_count(0)


def test_filters_and_words_to_avoid(browse):
    page = browse("/?q=red")
    page.locator("summary").click()
    page.get_by_label("entrance 2").check()
    page.get_by_label("Since").fill("2026-01-31T08:40")
    page.get_by_label("Words to avoid").fill("blue\nwhite")
    page.get_by_label("Their share").press("ArrowRight")
    expect(page.locator("output")).to_have_text("55 %")
    page.get_by_label("Number of results").fill("4")
    page.get_by_role("button", name="Apply").click()
    expect(page.locator(".card")).to_have_count(4)
    for text in page.locator(".card").all_inner_texts():
        (time,) = re.findall(r"2026-01-31 \d\d:\d\d", text)
        assert "camera entrance 2" in text and time >= "2026-01-31 08:40"
    assert "weight=0.55" in page.url and "until" not in page.url and "rerank" not in page.url
    page.get_by_role("link", name="Remove the filter camera entrance 2").click()
    expect(page.get_by_role("checkbox", name="entrance 2")).not_to_be_checked()
    expect(page.get_by_label("Words to avoid")).to_have_value("blue\nwhite")
    assert page.locator("details").get_attribute("open") is not None


def test_several_sentences(browse):
    page = browse("/?q=red")
    page.locator("summary").click()
    page.get_by_label("More sentences").fill("a white bag")
    page.get_by_label("Every sentence must fit").check()
    page.get_by_role("button", name="Apply").click()
    expect(page).to_have_url(re.compile(r"\?q=red&q=a\+white\+bag&every=1$"))
    expect(page.locator(".tag")).to_contain_text("every sentence")


def test_nothing_fits(browse):
    page = browse("/?q=red&path=nowhere")
    expect(page.locator(".message")).to_contain_text("No image fits the filters")
    page.get_by_role("link", name="Search without filters").click()
    expect(page.locator(".card")).to_have_count(24)


def test_errors_are_read_out_and_the_next_search_works(browse, server):
    page = browse()
    page.get_by_role("searchbox").fill("broken")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("the index is damaged")
    page.route("**/*", lambda route: route.abort())
    page.get_by_role("searchbox").fill("red")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer")
    page.unroute("**/*")
    page.keyboard.press("Enter")
    expect(page.locator(".card")).to_have_count(24)
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def test_an_image_of_ones_own(browse):
    page = browse("/?camera=entrance+1&q=blue")
    page.set_input_files("#file", {"name": "me.jpg", "mimeType": "image/jpeg", "buffer": jpeg("red")})
    expect(page.locator(".tag.image")).to_contain_text("similar to your image")
    expect(page.get_by_text("camera entrance 1").first).to_be_visible()
    page.set_input_files("#file", {"name": "me.jpg", "mimeType": "image/jpeg", "buffer": b"no image"})
    expect(page.get_by_role("alert")).to_contain_text("This image cannot be read")


def test_a_dropped_image(browse):
    page = browse()
    data = page.evaluate_handle(
        """bytes => { const data = new DataTransfer(); data.items.add(new File([new Uint8Array(bytes)], 'a.jpg'));
        return data; }""",
        list(jpeg("red")),
    )
    page.dispatch_event("body", "drop", {"dataTransfer": data})
    expect(page.locator(".tag.image")).to_contain_text("similar to your image")


def test_the_keyboard_alone(browse):
    page = browse("/?q=red&top=30")
    press = page.keyboard.press
    press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    press("Enter")
    expect(page.locator("#results")).to_be_focused()
    press("/")
    expect(page.locator("#q")).to_be_focused()
    press("ArrowDown")
    pictures = page.locator("a.picture")
    expect(pictures.nth(0)).to_be_focused()
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    columns = page.evaluate("getComputedStyle(document.querySelector('.cards')).gridTemplateColumns.split(' ').length")
    for key, index in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("End", 29),
    ):
        press(key)
        expect(pictures.nth(index)).to_be_focused()
    press("ArrowRight")  # there is none
    expect(pictures.nth(29)).to_be_focused()
    press("Escape")
    expect(page.locator("#q")).to_be_focused()
    page.locator("summary").focus()
    press("Enter")
    press("Tab")
    expect(page.locator("#also")).to_be_focused()
    press("Escape")
    assert page.locator("details").get_attribute("open") is None
    expect(page.locator("summary")).to_be_focused()
    pictures.nth(3).focus()
    press("Enter")
    expect(page.locator(".tag.image")).to_have_count(1)
    press("Tab")  # from the results to the first of them
    expect(pictures.nth(0)).to_be_focused()


@pytest.mark.parametrize("path", ["/", "/?q=red&not=blue&camera=entrance+1&like=3", "/?q=red&path=nowhere"])
def test_no_sideways_scrolling_on_a_phone(browse, path):
    page = browse(path, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("visualViewport.width") == 360
    small = page.evaluate(
        """[...document.querySelectorAll('button, .upload, .tag a, a.picture')].filter(shown => {
        const { width, height } = shown.getBoundingClientRect(); return width < 24 || height < 24; }).length"""
    )
    assert small == 0


CONTRAST = """() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(part => part / 255).map(
      part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = element => {
    const own = getComputedStyle(element).backgroundColor;
    return own.startsWith("rgba(0, 0, 0, 0") ? ground(element.parentElement) : own;
  };
  const shown = "h1, .index, #q, button, .tag, summary, .count, .card p, footer p, small, a";
  return [...document.querySelectorAll(shown)].map(
    element => {
      const [a, b] = [light(getComputedStyle(element).color), light(ground(element))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), element.outerHTML.slice(0, 60)];
    }).filter(([contrast]) => contrast < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_have_enough_contrast(browse, scheme):
    page = browse("/?q=red&camera=entrance+1", color_scheme=scheme)
    page.locator("summary").click()
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == (scheme == "dark")
    assert page.evaluate(CONTRAST) == []


def test_every_field_has_a_label_and_every_picture_a_text(browse):
    page = browse("/?q=red")
    unnamed = """[...document.querySelectorAll('input:not([type=hidden]), textarea, button, a')].filter(field =>
      !(field.labels?.length || field.textContent.trim() || field.ariaLabel)).map(field => field.outerHTML)"""
    assert page.evaluate(unnamed) == []
    assert all(alts(page))


def test_reduced_motion(browse):
    page = browse("/?q=red", reduced_motion="reduce")
    page.evaluate("document.querySelector('#results').setAttribute('aria-busy', true)")
    assert page.evaluate("getComputedStyle(document.querySelector('#results'), '::before').animationName") == "none"


def test_without_javascript(browse):
    page = browse("/", java_script_enabled=False)
    page.get_by_role("searchbox").fill("red")
    page.keyboard.press("Enter")
    expect(page.locator(".rank").first).to_have_text("1")
    expect(page.locator(".upload")).to_be_hidden()
    page.locator("a.picture").first.click()
    expect(page.locator(".tag.image")).to_contain_text("similar to")
