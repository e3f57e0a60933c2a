"""The page in a real browser, before the real server on a small folder, with a small model."""

import os
import shutil
import socket
import threading
import time

import pytest

from mlfsic_jax.data.folder import read_csv

pytestmark = pytest.mark.extras  # Playwright and a browser

HOSTILE = "<img src=x onerror=alert(1)>"
PATIENCE_MS = 20_000  # until a fit is there that other processes may slow down
LABEL_BOX, FIRST = "#names", ".tile:nth-child(1)"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright: pip install it")
    for name in ("fastapi", "uvicorn"):
        pytest.importorskip(name, reason="the app needs it: pip install 'mlfsic_jax[app]'")
    found = os.environ.get("MLFSIC_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium and no google-chrome: install one, or set MLFSIC_CHROMIUM to its path")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class App:
    """The server in a thread; it can be ended and begun again at the same address."""

    def __init__(self, folder, predictor):
        self.folder, self._predictor = folder, predictor
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.begin()

    def begin(self):
        import uvicorn

        from mlfsic_jax.app.server import create_app
        from mlfsic_jax.app.session import open_session

        self.session = open_session(self.folder, None, self._predictor, self.folder.parent / "cache")
        self.session.start()
        config = uvicorn.Config(
            create_app(self.session), port=self.port, log_level="warning", ws="none", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()

    def end(self):
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self.session.close()

    def decisions(self):
        return self.session.store.decisions()

    def order(self, order, label=""):
        return [self.session.collection.names[i] for i in self.session.photos(order, "all", label)]


@pytest.fixture
def app(folder, predictor):
    app = App(folder, predictor)
    yield app
    app.end()


@pytest.fixture
def open_page(browser, app):
    """Opens the page; nothing that it does may raise, ask, or turn to another address."""
    wrong, contexts = [], []

    def open_page(width=1200, height=800, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
        address = f"http://127.0.0.1:{app.port}/"
        page.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or wrong.append(r.url))
        page.goto(address)
        page.wait_for_selector(".tile")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


def add_labels(page, app, text="cat, dog = dog | puppy"):
    page.fill(LABEL_BOX, text)
    page.press(LABEL_BOX, "Enter")
    settle(page, app)
    page.locator(LABEL_BOX).evaluate("box => box.blur()")


def until(condition):
    end = time.monotonic() + PATIENCE_MS / 1000
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def soon(page, expression, expected):
    """The page need not have followed a key when the press returns."""
    until(lambda: page.evaluate(expression) == expected)


def settle(page, app):
    """Waits until all changes are saved, the fit has followed them, and the page knows."""
    until(lambda: page.evaluate("document.body.dataset.waiting") == "0" and page.input_value(LABEL_BOX) == "")
    until(lambda: app.session.fitted_version == app.session.store.version)
    until(lambda: not app.session.store.labels() or app.session.probabilities(0))
    until(lambda: page.evaluate("document.body.dataset.fits") == str(app.session.fits))
    page.wait_for_selector('#grid[aria-busy="false"]')


def shown(page):
    """Names of the photos in the grid, in its order."""
    return page.eval_on_selector_all(".tile img", "images => images.map((image) => image.alt)")


def chosen(page, name):
    page.click(f'.chip .name[data-key="{name}"]')
    page.wait_for_selector(f'.chip.chosen .name[data-key="{name}"]')
    page.wait_for_selector('#grid[aria-busy="false"]')


def swipe(page, selector, across):
    """Draws a finger over the middle of an element, ``across`` pixels to the right."""
    box, touch = page.locator(selector).bounding_box(), page.context.new_cdp_session(page)
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for kind, points in ("touchStart", [x - across / 2]), ("touchMove", [x + across / 2]), ("touchEnd", []):
        points = [{"x": point, "y": y} for point in points]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    touch.detach()


def test_clicks_decide_and_an_export_is_read(app, open_page, tmp_path):
    page = open_page()
    add_labels(page, app)
    assert [(label.name, label.wordings) for label in app.session.store.labels()] == [
        ("cat", ("cat",)),
        ("dog", ("dog", "puppy")),
    ]
    page.fill(LABEL_BOX, "fox = fox |")
    page.press(LABEL_BOX, "Enter")
    until(lambda: "a wording of fox: '' is not a label name" in page.inner_text("#status.failed"))
    page.fill(LABEL_BOX, "")
    page.check("[value=name]")
    until(lambda: shown(page)[0] == app.session.collection.names[0])
    chosen(page, "cat")
    a, b, c, d = shown(page)[:4]
    page.click(f"{FIRST} .main")
    page.click(".tile:nth-child(2) .main", modifiers=["Shift"])
    page.hover(".tile:nth-child(3)")
    page.click(".tile:nth-child(3) .no")
    page.click(".tile:nth-child(4) .main")
    page.keyboard.press("2")  # dog, of the photo that was clicked last
    page.click(".tile:nth-child(4) .main")  # cat is undecided again
    settle(page, app)
    expected = {a: {"cat": 1}, b: {"cat": 0}, c: {"cat": 0}, d: {"dog": 1}}
    assert app.decisions() == expected
    assert page.locator(".tile .main[aria-pressed=true]").count() == 1

    page.reload()  # keeps decisions, order and label
    page.wait_for_selector(f"{FIRST} .main[aria-pressed=true]")
    assert shown(page)[:4] == [a, b, c, d]
    assert page.inner_text(f"{FIRST} .tag.yes b") == "cat"

    page.click("#save")
    with page.expect_download() as download:
        page.click("[data-format=csv]")
    download.value.save_as(app.folder / download.value.suggested_filename)
    labels, names = read_csv(app.folder / "labels.csv")
    found = {path.relative_to(app.folder).as_posix(): given for path, given in labels.items()}
    assert found == {a: ["cat"], d: ["dog"]} and set(names) == {"cat", "dog"}  # of the others a label is open

    page.click("#undo")
    page.wait_for_selector(".tile:nth-child(4) .main[aria-pressed=true]")
    page.keyboard.press("Control+z")
    settle(page, app)
    assert app.decisions() == {a: {"cat": 1}, b: {"cat": 0}, c: {"cat": 0}, d: {"cat": 1}}


def test_keys_accept_move_and_open(app, open_page):
    page = open_page()
    add_labels(page, app)
    page.check("[value=certain]")
    page.wait_for_selector('#grid[aria-busy="false"]')
    first, second = (app.session.collection.number[name] for name in shown(page)[:2])
    page.locator(".tile .main").first.focus()
    before = app.session.probabilities(first)
    page.keyboard.press("Enter")
    settle(page, app)
    thresholds = app.session.thresholds()
    accepted = {name: int(p > thresholds[name]) for name, p in before.items()}
    assert app.decisions() == {app.session.collection.names[first]: accepted}
    soon(page, "document.activeElement.dataset.id", str(second))  # and moved on
    for key, place in (("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        soon(page, "document.activeElement.firstChild.alt", shown(page)[place])
    above = page.evaluate("document.activeElement.parentElement.offsetTop")
    page.keyboard.press("ArrowDown")
    until(lambda: page.evaluate("document.activeElement.parentElement.offsetTop") > above)
    page.keyboard.press("ArrowUp")
    soon(page, "document.activeElement.parentElement.offsetTop", above)
    page.locator(".tile .main").first.focus()
    page.keyboard.press("Space")
    page.wait_for_selector("#photo[open]")
    page.keyboard.press("ArrowRight")
    until(lambda: page.inner_text("#photo-name") == app.session.collection.names[second])
    page.keyboard.press("Shift+1")
    page.keyboard.press("Escape")
    soon(page, "document.activeElement.dataset.id", str(second))
    settle(page, app)
    assert app.session.store.decided(app.session.collection.names[second]) == {"cat": 0}
    page.keyboard.press("u")
    page.keyboard.press("u")
    settle(page, app)
    assert app.decisions() == {}  # accepting was one step
    page.keyboard.press("/")
    soon(page, "document.activeElement.id", "names")


def test_photos_stay_until_they_are_sorted_anew(app, open_page):
    page = open_page()
    add_labels(page, app)
    page.check("[value=certain]")
    chosen(page, "dog")
    before = shown(page)
    assert before == app.order("certain", "dog")
    for place in (9, 8):  # the least likely
        page.click(f".tile:nth-child({place}) .main")
    settle(page, app)
    after = app.order("certain", "dog")
    assert after != before and shown(page) == before
    i = app.session.collection.number[before[0]]
    percent = f"{100 * app.session.probabilities(i)['dog']:.0f} %"
    until(lambda: page.inner_text(f"{FIRST} .tag small").strip() == percent)
    page.keyboard.press("r")
    until(lambda: shown(page) == after)
    page.wait_for_selector("#anew", state="hidden")


def test_a_photo_and_a_label_explain_themselves(app, open_page):
    app.session.store.name_label("cat")
    names = app.session.collection.names
    app.session.store.decide([(names[i], "cat", value) for i, value in enumerate([1, 1, 0, 0])])
    app.session.changed()
    page = open_page()
    settle(page, app)
    page.click(f".tile:has(img[alt='{names[5]}']) .main")
    page.wait_for_selector("#heat:not([hidden])")
    assert page.inner_text(".row .p") == f"{100 * app.session.probabilities(5)['cat']:.0f} %"
    assert page.locator(".classes li").count() == 5
    shares = page.locator(".why .legend span").all_inner_texts()
    assert sum(int(share.split()[1]) for share in shares) in (99, 100, 101)  # each is rounded
    for match in page.locator(".matches button").all():
        assert match.get_attribute("title") in names[:4]
    page.click(".answer.yes")
    page.keyboard.press("Escape")
    settle(page, app)
    assert app.session.store.decided(names[5]) == {"cat": 1}

    page.click(".chip .more")
    page.click("text=View label")
    page.wait_for_selector("#label[open]")
    assert page.inner_text("#examples-title") == "3 examples"
    quality = app.session.quality("cat")
    figures = ["–" if value is None else f"{100 * value:.0f} %" for value in (quality["precision"], quality["recall"])]
    assert page.locator(".figure b").all_inner_texts() == figures and "5 photos" in page.inner_text("#quality")
    page.locator("#threshold").fill("0.2")
    settle(page, app)
    assert app.session.thresholds() == {"cat": 0.2}
    above = sum(p > 0.2 for i in range(len(names)) if (p := (app.session.probabilities(i) or {}).get("cat", 0)))
    proposed = above - sum(app.session.probabilities(i)["cat"] > 0.2 for i in (0, 1, 2, 3, 5))
    until(lambda: page.inner_text("#proposals-title").startswith(f"{proposed} proposal"))
    page.keyboard.press("Escape")

    page.click(".chip .more")
    page.click("text=Remove label")
    assert "5 decisions" in page.inner_text("#ask-lines")
    page.click("#ask-no")
    assert [label.name for label in app.session.store.labels()] == ["cat"]
    page.click(".chip .more")
    page.click("text=Remove label")
    page.click("#ask-yes")
    page.wait_for_selector("#first", state="visible")
    assert app.session.store.labels() == () and app.decisions() == {}


def test_hostile_names_stay_text(app, open_page):
    app.session.store.name_label(HOSTILE)
    app.session.store.decide([(f"sub/{HOSTILE}.png", HOSTILE, 1)])
    app.session.changed()
    page = open_page()
    settle(page, app)
    add_labels(page, app, "<b>bold</b>")
    assert page.locator(".chip .name span").all_inner_texts() == [HOSTILE, "<b>bold</b>"]
    page.click(".tile:has(.tag.yes) .main")
    page.wait_for_selector("#heat:not([hidden])")
    assert page.inner_text("#photo-name") == f"sub/{HOSTILE}.png"
    page.keyboard.press("Enter")  # the status line and the next photo
    page.keyboard.press("Escape")
    page.click(".chip .more >> nth=0")
    page.click("text=View label")
    page.wait_for_selector("#label[open]")
    assert page.inner_text("#label-name") == HOSTILE
    page.keyboard.press("Escape")
    page.click("#unreadable")
    assert page.inner_text("#ask-lines").startswith("damaged.jpg: ")
    assert page.locator("img[src=x], [onerror]").count() == 0  # it would have asked besides: see open_page
    assert page.locator("b:text-is('bold')").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction(app, open_page, scheme):
    for name in ("cat", "dog", "a label of many words that says more than there is room for", "w" * 80):
        app.session.store.name_label(name)
    page = open_page(390, 844, has_touch=True, is_mobile=True, color_scheme=scheme)
    settle(page, app)

    def fits(selector):
        return page.eval_on_selector(selector, "node => node.scrollWidth <= node.clientWidth")

    assert fits("html") and page.evaluate("innerWidth") == 390
    page.tap(f"{FIRST} .main")
    page.wait_for_selector("#heat:not([hidden])")
    assert fits("#photo") and fits("#photo .panel")
    page.tap("#photo [data-close]")
    page.tap(".chip .more >> nth=0")
    page.tap("text=View label")
    page.wait_for_selector("#label[open]")
    assert fits("#label")
    back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, back[4:-1].split(","))) < 384) == (scheme == "dark")


def test_a_swipe_turns_to_the_next_photo(open_page):
    page = open_page(390, 844, has_touch=True, is_mobile=True)
    first, second = shown(page)[:2]
    page.tap(f"{FIRST} .main")
    for across, expected in ((-150, second), (150, first), (-20, first)):  # the last one is too short
        swipe(page, "#stage", across)
        soon(page, "document.querySelector('#photo-name').innerText", expected)


def test_the_page_is_loaded_again_where_photos_came_over_a_restart(app, open_page, folder):
    page = open_page()
    add_labels(page, app, "cat")
    before = len(shown(page))
    app.end()
    shutil.copy(folder / "1.png", folder / "00 new.png")  # now all have other numbers
    app.begin()
    page.wait_for_selector(f".tile:nth-child({before + 1})")
    chosen(page, "cat")
    name = shown(page)[0]
    page.click(f"{FIRST} .main")
    settle(page, app)
    assert app.decisions() == {name: {"cat": 1}}


def test_a_server_that_ends_is_told_and_found_again(app, open_page):
    page = open_page()
    add_labels(page, app, "cat")
    chosen(page, "cat")
    name = shown(page)[0]
    app.end()
    page.click(f"{FIRST} .main")
    page.wait_for_selector("#gone", state="visible")
    assert "nothing is lost" in page.inner_text("#gone")
    assert "Not saved" in page.inner_text("#status")
    assert page.locator(".tile .main[aria-pressed=true]").count() == 0  # what is not saved is not shown as if
    app.begin()
    page.wait_for_selector("#gone", state="hidden")
    page.click(f"{FIRST} .main")
    settle(page, app)
    assert app.decisions() == {name: {"cat": 1}}
