"""The report of a tiny run: its numbers, its pictures, and the page itself in a headless Chromium."""

import base64
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from mlfsic_jax.core.lcm import lcm_select
from mlfsic_jax.methods import METHODS, lcm
from mlfsic_jax.report import episodes as shown_episodes
from mlfsic_jax.report import page as report
from mlfsic_jax.report import write_report
from mlfsic_jax.report.__main__ import main
from mlfsic_jax.run import evaluate, inputs, saved
from mlfsic_jax.run.experiment import novel_key, train_and_evaluate
from mlfsic_jax.system.errors import InputError
from tests.tiny import scenes


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    train_and_evaluate(scenes(folder, **{"shots": (1, 2), "train.epochs": 3}), folder / "run")
    return folder / "run"


@pytest.fixture
def results(workdir):
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def page(workdir):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([f"--workdir={workdir}"])
    assert printed.getvalue() == f"report: {workdir / 'report.html'}\n"  # no data card before it
    return workdir / "report.html"


@pytest.fixture(scope="module")
def opened(workdir):
    """(config, run, novel split, predictor)."""
    predictor = saved.load(workdir)
    config = ml_collections.ConfigDict(predictor.config)
    run = inputs.load(config)
    views = inputs.feature_views(run, predictor.trained[1].stores["episodes"]["variables"])
    return config, run, views["novel"], predictor


@pytest.fixture(scope="module")
def look(opened):
    config, _, view, predictor = opened
    return shown_episodes.look_at(config, view, predictor.trained[1], predictor.grid, number=1)


class Elements(HTMLParser):
    """(tag, attributes, text up to the next tag) of every opening tag."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append([tag, dict(attributes), ""])

    def handle_data(self, data):
        if self.found:
            self.found[-1][2] += data

    def all(self, tag):
        return [(attributes, text) for found, attributes, text in self.found if found == tag]


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    elements = Elements(text)
    assert {attributes["href"].split("/")[2] for attributes, _ in elements.all("a")} <= {"doi.org"}  # to click on
    assert all(a["src"].startswith("data:image/webp;base64,") for a, _ in elements.all("img"))
    assert not elements.all("script") and not elements.all("link") and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(text) < 3e6 and text.rstrip().endswith("</html>")
    assert not list(page.parent.glob("*.part"))
    ids = [attributes["id"] for _, attributes, _ in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)


def test_every_picture_says_what_it_shows(page):
    images = Elements(page.read_text()).all("img")
    assert all(len(attributes["alt"]) > 15 for attributes, _ in images)
    charts = Elements(page.read_text()).all("svg")
    assert [a["aria-label"].split(",")[0] for a, _ in charts] == [
        *["Ma-AP of all methods"] * 2,
        "Training curves",
        "Ma-AP and share of kept positions over theta",
    ]
    for attributes, _ in images:
        picture = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        assert picture.size == (int(attributes["width"]), int(attributes["height"]))


def test_the_table_holds_the_results(page, results):
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', page.read_text())
    rows = [(name, re.findall(r"<b>(.*?)</b> <small>± (.*?)</small>", cells)) for name, cells in rows]
    columns = ("macro_ap", "micro_ap", "macro_f1", "micro_f1")
    expected = []
    for result in results:
        expected.append(("chance", result["chance"], columns[:2]))
        expected += [(name.replace("_", " "), values, columns) for name, values in result["methods"].items()]
        pairs = result["paired"].items()
        expected += [(name.replace("-", " − ").replace("_", " "), values, columns) for name, values in pairs]
    assert rows == [
        (name, [(f"{100 * v[m]['mean']:.1f}".replace("-", "−"), f"{100 * v[m]['ci95']:.1f}") for m in metrics])
        for name, v, metrics in expected
    ]


def test_an_episode_is_seen_as_it_was_evaluated(opened, look, results):
    config, _, view, predictor = opened
    trained = predictor.trained[1]
    assert trained.n_shot == look.n_shot == 2
    names = ("region_word_ridge", "lcm")  # one that explains itself, and one with maps
    assert tuple(look.probabilities) == names
    key = novel_key(config.seed, 2)
    scores = evaluate.score_episodes(
        *({name: trained.methods[name] for name in names}, {name: saved.trained_of(trained, name) for name in names}),
        view,
        key=key,
        n_episodes=config.eval.episodes,
        n_shot=2,
        n_query=config.eval.n_query,
    )
    calibration, explained = results[1]["validation"]["calibration"]["region_word_ridge"], METHODS["region_word_ridge"]
    by_regions = evaluate.probabilities(explained, scores.methods["region_word_ridge"][1], calibration)
    supports, queries = evaluate.draw(jax.random.split(key)[0], view, 4, 2, config.eval.n_query)
    np.testing.assert_array_equal(look.support, supports[1])
    places = [queries[1].tolist().index(row) for row in look.query]
    assert sorted(places) == list(range(12)) and look.query_labels[:6].any(axis=0).all()  # first one for each label
    # float32 in another order of summation, through a kernel matrix and a spread
    np.testing.assert_allclose(look.probabilities["region_word_ridge"], by_regions[places], atol=2e-3)
    by_lcm = evaluate.probabilities(METHODS["lcm"], scores.methods["lcm"][1])
    np.testing.assert_allclose(look.probabilities["lcm"], by_lcm[places], atol=1e-4)
    np.testing.assert_array_equal(look.query_labels, scores.labels[1][places])


def test_an_explanation_adds_up_to_the_prediction(opened, look):
    _, _, _, predictor = opened
    calibration = predictor.trained[1].calibration["region_word_ridge"]
    prior, pairs, dual = (look.explanation[name] for name in ("prior", "pairs", "dual"))
    total = prior + np.einsum("qslm,sc->qc", pairs, dual)
    for c in range(total.shape[1]):  # standardising and calibrating keep the order of queries
        np.testing.assert_array_equal(
            np.argsort(total[:, c], kind="stable"),
            np.argsort(look.probabilities["region_word_ridge"][:, c], kind="stable"),
        )
    assert calibration[0] > 0


def test_maps_are_those_of_the_public_function(opened, look):
    config, run, view, predictor = opened
    trained = predictor.trained[1]
    variables = trained.stores["episodes"]["variables"]
    features = view.inputs(look.support)
    options = {"epochs": config.lcm.tune_epochs, "learning_rate": config.lcm.tune_learning_rate}
    tuned = jax.jit(functools.partial(lcm.tune, run.model, **options))(
        variables, features.mean(axis=(1, 2)), view.labels[look.support], view.word_vectors
    )
    joint = tuned["params"]["joint"]
    words, projection = view.word_vectors @ joint["a_text"]["kernel"], joint["a_visual"]["kernel"]
    select = jax.jit(functools.partial(lcm_select, scale=config.model.scale, threshold=trained.tuned["lcm"]))
    rounded = features.astype(np.float16).astype(np.float32)  # as LCM keeps them
    keep, score, _ = select(rounded, view.labels[look.support], words, projection=projection)
    np.testing.assert_allclose(look.maps["lcm"], score, rtol=1e-3, atol=1e-5)  # a scan of 20 steps in float32
    np.testing.assert_array_equal(look.maps["keep"], keep)
    assert look.maps["attention"].shape == (12, 6, *predictor.grid)


def test_photos_are_the_images_of_the_split(opened):
    config, run, _, _ = opened
    dataset, photo = shown_episodes.photo_loader(config, len(run.splits["novel"].labels))
    row = 17
    assert photo(row).shape == (256, 256, 3)
    small = np.asarray(Image.fromarray(photo(row)).resize((32, 32), Image.Resampling.BOX)).astype(float)
    same, other = (np.abs(small - run.splits["novel"].inputs(np.array([i]))[0]).mean() for i in (row, row + 1))
    assert same < 8 < 20 < other  # the same scene, but for noise
    names = [dataset.label_names[c] for c in dataset.splits["novel"].labels]
    assert tuple(names) == run.splits["novel"].label_names


def test_rows_skip_photos_that_cannot_be_read(opened, monkeypatch):
    config, run, _, _ = opened
    dataset = inputs.load_dataset(config)
    first = int(dataset.splits["novel"].images[0])

    def load_image(i):
        if i == first + 1:
            raise InputError("photo is damaged")
        return np.full((8, 8, 3), i % 256, np.uint8)

    broken = dataclasses.replace(dataset, load_image=load_image)
    monkeypatch.setattr(shown_episodes.inputs, "load_dataset", lambda _: broken)
    _, photo = shown_episodes.photo_loader(config, len(run.splits["novel"].labels) - 1)
    assert [photo(row)[0, 0, 0] for row in (0, 1, 2)] == [(first + i) % 256 for i in (0, 2, 3)]


def result_of(dataset, n_shot, policy="", split=""):
    return {"dataset": dataset, "n_shot": n_shot, "config": {"data": {"policy": policy, "split": split}}}


@pytest.mark.parametrize(
    ("dataset", "n_shot", "method", "words", "expected", "table"),
    [
        ("voc", 1, "LCM", "GloVe", (58.03, 50.98, 47.31, 44.18), 11),
        ("voc", 5, "Base", "mirrorBERT", (63.33, 55.36, 51.55, 49.37), 11),
        ("voc", 5, "MAML", "", (50.03, 45.95, 42.74, 39.26), 11),
        ("nus_wide", 1, "WGA", "GloVe", (38.12, 32.91, 30.71, 31.53), 12),
        ("coco", 5, "LCM", "GloVe", (52.79,), 7),
        ("coco", 1, "LCM", "mirrorBERT", (51.55,), 8),
    ],
)
def test_published_numbers(dataset, n_shot, method, words, expected, table):
    rows = [
        row
        for row in report.published(result_of(dataset, n_shot))
        if (row["method"], row["words"], row["backbone"]) == (method, words, "ResNet-50")
    ]
    (row,) = rows
    found = [row[m] for m in ("macro_ap", "micro_ap", "macro_f1", "micro_f1") if m in row]
    assert tuple(found) == expected and row["table"] == table and row["n_shot"] == n_shot


def test_published_numbers_stand_beside_the_same_setting_alone():
    assert len(report.published(result_of("voc", 5))) == 13
    for other in (result_of("scenes", 1), result_of("voc", 3), result_of("imaterialist", 1)):
        assert report.published(other) == []
    assert report.published(result_of("coco", 1, policy="laso")) == []
    assert report.published(result_of("voc", 1, split="mine.json")) == []


def test_published_numbers_are_in_the_table_and_the_chart(workdir, results, tmp_path):
    for result in results:
        result["dataset"] = "voc"
        result["n_shot"] = {1: 1, 2: 5}[result["n_shot"]]
    results[0]["config"]["shots"] = [1, 5]
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path, episodes=0).read_text()
    assert "Yan et al. 2025" in text and "VOC 2007 + 2012" in text and "table 11" in text
    row = re.search(r'<th scope="row">LCM <small>ResNet-50, GloVe</small></th>(.*?)</tr>', text)[1]
    assert re.findall(r"<td>([\d.]+)</td>", row) == ["58.0", "51.0", "47.3", "44.2"]
    assert text.count("LCM GloVe *") == 2  # one chart for each shot count
    assert "<img" not in text and "Training curves" not in text  # no episodes, no metrics.jsonl


def test_a_run_of_other_methods_has_a_page_too(workdir, results, tmp_path):
    """As with ``config.eval.methods``: without a method that explains itself, without LCM, without both."""
    for names in (
        ("ridge", "lcm"),
        ("region_word_ridge", "word_ridge"),
        ("ridge", "zero_shot"),
        ("ridge", "prototypes"),
    ):
        copy = tmp_path / "-".join(names)
        shutil.copytree(workdir, copy)
        (copy / "results.json").write_text(json.dumps([evaluated(result, names) for result in results]))
        text = write_report(copy, episodes=1).read_text()
        explains, maps = "region_word_ridge" in names, "lcm" in names or "zero_shot" in names
        best = max(names, key=lambda name: results[0]["validation"]["macro_ap"][name])
        shown = dict.fromkeys(
            [*(["region_word_ridge"] if explains else [best]), *(n for n in names if n in ("lcm", "zero_shot"))]
        )
        predicted_by = re.findall(r"<dt>(.*?)</dt><dd>\s*<span class=\"chip (?:right|wrong|missed)\">", text)
        assert set(predicted_by) == {name.replace("_", " ") for name in shown}
        assert ('<ol class="pairs">' in text) == explains
        assert ("attention for" in text) == maps
        assert ("LCM keeps" in text) == ("over theta" in text) == ("LCM removes" in text) == ("lcm" in names)


def evaluated(result, names):
    """The entry of ``results.json`` as if only these methods had been evaluated."""
    result = result | {
        "methods": {name: result["methods"][name] for name in names},
        "calibration_error": {name: result["calibration_error"][name] for name in names},
        "paired": {},
        "validation": {part: {k: v for k, v in of.items() if k in names} for part, of in result["validation"].items()},
    }
    if "lcm" not in names:
        del result["theta"]
    return result


def test_every_method_of_the_results_is_in_the_table(results, tmp_path):
    for result in results:  # as if all had been evaluated, those on request too
        for part in ("methods", "calibration_error"):
            result[part] = dict.fromkeys(METHODS, result[part]["lcm"])
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = write_report(tmp_path, episodes=0).read_text()
    for name in METHODS:
        assert text.count(f'<tr><th scope="row">{name.replace("_", " ")}</th>') == len(results)


def test_the_command_names_itself_in_its_help():
    command = [sys.executable, "-m", "mlfsic_jax.report", "--help"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage: python -m mlfsic_jax.report ")
    assert all(flag in found.stdout for flag in ("--workdir", "--out", "--episodes", "--seed"))
    assert not found.stderr


def run_command(*flags):
    with pytest.raises(SystemExit) as caught:
        main(list(flags))
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_mistakes_end_in_one_line(workdir, results, tmp_path):
    assert "--workdir" in run_command()
    assert f"{tmp_path / 'none' / 'results.json'} is missing" in run_command(f"--workdir={tmp_path / 'none'}")
    (tmp_path / "results.json").write_text('[{"n_sh')
    assert "is damaged" in run_command(f"--workdir={tmp_path}")
    (tmp_path / "results.json").write_text(json.dumps(results[:1]))
    assert "no results for 2-shot yet" in run_command(f"--workdir={tmp_path}")
    del results[1]["calibration_error"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "of an older version" in run_command(f"--workdir={tmp_path}")
    assert "--episodes=-1" in run_command(f"--workdir={workdir}", "--episodes=-1")
    assert "--episodes" in run_command(f"--workdir={workdir}", "--episodes=many")
    nowhere = tmp_path / "no" / "such" / "page.html"
    assert f"cannot write {nowhere}" in run_command(f"--workdir={workdir}", "--episodes=0", f"--out={nowhere}")
    copy = tmp_path / "copy"
    shutil.copytree(workdir, copy)
    settings = json.loads((copy / "trained_with.json").read_text())
    settings["inputs"]["dataset"] = "another"
    (copy / "trained_with.json").write_text(json.dumps(settings))
    assert "not those that" in run_command(f"--workdir={copy}")


class Browser:
    """A headless Chromium, spoken to through two pipes (Chrome DevTools Protocol)."""

    def __init__(self, binary, folder):
        self.number, self.events, self.received = 0, [], b""
        commands, self.writer = os.pipe()
        self.reader, answers = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]
        # The protocol runs over the file descriptors 3 and 4.
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{commands} 4>&{answers}',
                "bash",
                binary,
                *flags,
                f"--user-data-dir={folder}",
            ],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands), os.close(answers)
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def receive(self):
        while b"\0" not in self.received:
            part = os.read(self.reader, 1 << 20)
            assert part, "Chromium closed the connection"
            self.received += part
        message, self.received = self.received.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path, width, height, scheme):
        phone = width < 600
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not self.happened("Page.loadEventFired"):
            self.events.append(self.receive())

    def happened(self, method):
        return [event["params"] for event in self.events if event.get("method") == method]

    def evaluate(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"]["value"]

    def screenshot(self):
        """uint8 [H, W, 3]: what is seen without scrolling."""
        data = base64.b64decode(self.call("Page.captureScreenshot")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=30)
        os.close(self.writer), os.close(self.reader)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"none of {', '.join(names)} is installed (on Debian: apt-get install chromium)")
    browser = Browser(binary, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def luminance(colour):
    """WCAG 2's relative luminance of sRGB in 0..255, [..., 3]."""
    c = np.asarray(colour) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ np.array([0.2126, 0.7152, 0.0722])


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# Every piece of text with its colour, the backgrounds below it and its place.
TEXTS = """(() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
    const style = getComputedStyle(element), range = document.createRange();
    range.selectNodeContents(walker.currentNode);
    const box = range.getBoundingClientRect(), backgrounds = [];
    for (let e = element; e; e = e.parentElement) backgrounds.push(getComputedStyle(e).backgroundColor);
    const drawn = element instanceof SVGElement;
    found.push({text: walker.currentNode.data.trim(), colour: drawn ? style.fill : style.color, backgrounds,
                right: box.right, left: box.left, height: box.height});
  }
  return found;
})()"""


def rgb(text):
    return [float(x) for x in re.findall(r"[\d.]+", text)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1440, 900)])
def test_the_page_in_a_browser(browser, page, results, size, scheme):
    browser.open(page, *size, scheme)
    requests = [event["request"]["url"] for event in browser.happened("Network.requestWillBeSent")]
    assert {url.split(":")[0] for url in requests} == {"data", "file"} and page.as_uri() in requests
    assert not browser.happened("Log.entryAdded") and not browser.happened("Network.loadingFailed")

    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    decoded = browser.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth])")
    assert len(decoded) > 40 and all(complete and natural > 0 and shown > 0 for complete, natural, shown in decoded)

    shown = browser.evaluate("[...document.querySelectorAll('.value')].map(e => [+e.dataset.shots, e.innerText])")
    for (n_shot, text), result in zip(shown, results, strict=True):
        best = max((v["macro_ap"] for v in result["methods"].values()), key=lambda v: v["mean"])
        assert n_shot == result["n_shot"]
        assert [float(x) for x in re.findall(r"[\d.]+", text)] == [
            float(f"{100 * best[name]:.1f}") for name in ("mean", "ci95")
        ]

    texts = browser.evaluate(TEXTS)
    assert len(texts) > 300
    for found in texts:
        behind = next(rgb(b) for b in found["backgrounds"] if len(rgb(b)) == 3 or rgb(b)[3] > 0)
        assert contrast(rgb(found["colour"])[:3], behind[:3]) >= 4.5, found  # WCAG AA
        assert found["left"] >= 0 and found["right"] <= size[0] and found["height"] > 9, found

    pixels = browser.screenshot()
    background = pixels[-1, 2]
    assert pixels.shape[:2] == size[::-1]
    assert (luminance(background) > 0.8) if scheme == "light" else (luminance(background) < 0.05)
    box = browser.evaluate("document.querySelector('h1').getBoundingClientRect().toJSON()")
    left, top, right, bottom = (int(box[side]) for side in ("left", "top", "right", "bottom"))
    title = pixels[top:bottom, left:right].reshape(-1, 3)
    ink = title[np.abs(luminance(title) - luminance(background)).argmax()]
    assert contrast(ink, background) > 10
