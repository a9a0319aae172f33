"""The lessons in a real browser: sliders moved by keyboard, numbers read back, exercises solved, on two widths.

Needs the extras `lessons` and `browser`, and chromium; skipped by name without them.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tinygrad_bn import Tensor
from tinygrad_bn import functional as F

pytest.importorskip("marimo", reason="needs pip install 'tinygrad-bn[lessons]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs pip install 'tinygrad-bn[browser]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs pip install 'tinygrad-bn[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LESSONS = sorted(path.stem for path in (ROOT / "demos" / "lessons").glob("lesson_*.py"))
PATIENCE = 120_000  # milliseconds; the machine may be busy


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a marimo server of the lessons."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lessons = [f"demos/lessons/{lesson}.py" for lesson in LESSONS]
    command = [sys.executable, "-m", "marimo", "run", *lessons, "--headless", "--no-token", "-p", str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    log = (tmp_path_factory.mktemp("marimo") / "log").open("w+")
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{url}/health").close()
            break
        except OSError:
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.2)
    yield url
    server.send_signal(signal.SIGTERM)
    server.wait(30)
    log.close()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def open_lesson(browser, address):
    """Open a lesson and wait until both exercises have a verdict. In the end there is no error in the console."""
    errors, pages = [], []

    def opened(lesson, language="en", width=1200):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: message.type == "error" and errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/?file={lesson}.py&lang={language}")
        sync_api.expect(page.locator(".verdict")).to_have_count(2, timeout=PATIENCE)
        return page

    yield opened
    for page in pages:
        page.close()
    assert errors == []


def read(page, name):
    """The number, or the row of numbers, with this name."""
    cells = page.locator(f'[data-name="{name}"], [data-name^="{name}["]').all_inner_texts()
    digits = str.maketrans("−⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "--0123456789")
    return np.array([float(cell.translate(digits).replace("·10", "e")) for cell in cells])


def expect_shown(page, name, expected, **tolerance):
    """Wait until the row of numbers with this name, or its first one, is `expected`: a busy machine draws late."""
    end = time.monotonic() + PATIENCE / 1000
    while (read(page, name) if np.ndim(expected) else read(page, name)[0]) != pytest.approx(expected, **tolerance):
        assert time.monotonic() < end, f"{name} is {read(page, name)}, not {expected}"
        page.wait_for_timeout(100)


def press(page, slider, key, times, changed):
    """Move the slider of this label by keyboard, and wait until the number `changed` has another value."""
    before = read(page, changed).tolist()
    page.get_by_role("slider", name=slider, exact=True).focus()
    for _ in range(times):
        page.keyboard.press(key)
    end = time.monotonic() + PATIENCE / 1000
    while read(page, changed).tolist() == before:
        assert time.monotonic() < end, f"{changed} stays {before}"
        page.wait_for_timeout(100)
    page.wait_for_timeout(1500)  # the last key's numbers follow those of the first


def gradient(f, x, g):
    t = Tensor(np.asarray(x, float), requires_grad=True)
    f(t).backward(np.asarray(g, float))
    return t.grad.numpy()


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_is_shown_whole_on_two_widths_and_in_both_languages(open_lesson, lesson):
    page = open_lesson(lesson)
    for exercises, switch in (("exercise", None), ("연습 문제", "한국어")):
        if switch:
            page.get_by_text(switch).click()
        sync_api.expect(page.get_by_text(exercises).first).to_be_visible(timeout=PATIENCE)
        page.wait_for_timeout(2000)
        for width in (390, 1200):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        text = page.inner_text("body")
        for fault in ("$$", r"\frac", "[[", "Traceback", "An ancestor"):
            assert fault not in text
        assert page.locator("svg.picture:not([aria-label])").count() == 0


# Serious findings of axe in what marimo itself draws: a part of the element's HTML for each rule.
MARIMOS = {
    "button-name": ('aria-haspopup="menu"',),  # its menu has no name
    "aria-input-field-name": ('class="cm-content',),  # nor has its code editor; the group around it is named
    "scrollable-region-focusable": ('class="cm-scroller"',),  # the editor, whose text has the focus
    "color-contrast": (">Back</span>", 'class="ͼ'),  # its link to the list of lessons; colours of code
}


@pytest.mark.parametrize("lesson", LESSONS)
def test_axe_finds_nothing_serious_in_a_lesson(open_lesson, lesson):
    page = open_lesson(lesson, "ko" if lesson[7] in "246" else "en")
    for scheme, width in product(("light", "dark"), (390, 1200)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        sync_api.expect(page.locator(f"body.{scheme}-theme")).to_be_visible(timeout=PATIENCE)
        page.wait_for_timeout(2000)
        found = [
            (violation["id"], node["html"], node["failureSummary"])
            for violation in axe.Axe().run(page).response["violations"]
            if violation["impact"] in ("serious", "critical")
            for node in violation["nodes"]
            if not any(part in node["html"] for part in MARIMOS.get(violation["id"], ()))
        ]
        assert found == [], (scheme, width)


@pytest.mark.parametrize("lesson", LESSONS)
def test_every_control_is_reached_by_the_keyboard(open_lesson, lesson):
    page = open_lesson(lesson)
    page.wait_for_timeout(2000)
    focused = """() => {
        let e = document.activeElement;
        while (e.shadowRoot?.activeElement) e = e.shadowRoot.activeElement;
        if (e.matches(".cm-content")) return "editor";
        return e.getAttribute("role") ?? e.tagName.toLowerCase();
    }"""
    visited = []
    for _ in range(80):
        page.keyboard.press("Tab")
        visited.append(page.evaluate(focused))
        if visited[-1] == "editor":
            page.keyboard.press("Escape")  # the next Tab leaves the editor, and does not indent
        if visited[-1] == "body":
            break
    assert visited.count("editor") == 2
    assert visited.count("slider") == page.get_by_role("slider").count() > 0
    assert visited.count("radio") == 1, "the language; arrows change it"


def solution_of(page, i):
    """The text of the ith folded solution. A click is lost if the page is drawn again under it."""
    folded = page.locator("marimo-accordion")
    folded = folded.nth(folded.count() - 2 + i)
    text = folded.get_by_role("region").locator("pre")
    for _ in range(30):
        folded.get_by_role("button").click()
        page.wait_for_timeout(1000)
        if text.count() and text.first.is_visible():
            return text.first.inner_text()
    raise AssertionError("the solution did not open")


@pytest.mark.parametrize("lesson", LESSONS)
def test_the_solutions_typed_into_the_editors_are_accepted(open_lesson, lesson):
    page = open_lesson(lesson)
    verdicts = page.locator(".verdict")
    for i in range(2):
        assert "✓" not in verdicts.nth(i).inner_text()
        solution = solution_of(page, i)
        editor = page.locator("marimo-code-editor .cm-content").nth(i)
        for _ in range(20):  # a page that is still being drawn takes the focus away
            editor.click()
            page.keyboard.press("Control+a")
            page.keyboard.insert_text(solution)
            page.wait_for_timeout(500)
            if editor.inner_text().split() == solution.split():
                break
        sync_api.expect(verdicts.nth(i)).to_contain_text("✓", timeout=PATIENCE)


def test_lesson_1_follows_its_sliders_and_keeps_them_in_the_other_language(open_lesson):
    page = open_lesson(LESSONS[0])
    press(page, "w", "ArrowRight", 3, "dw")
    w, x, b = 1.1, 1.5, -0.5
    for name, at in (("dw", w), ("dx", x), ("db", b)):
        others = {"dw": lambda t: t * x + b, "dx": lambda t: w * t + b, "db": lambda t: t + w * x}[name]
        expect_shown(page, name, float(gradient(lambda t, f=others: F.tanh(f(t)), at, 1.0)), rel=1e-3)
    press(page, "g₂", "ArrowRight", 2, "gᵀ J")
    rows = np.array([read(page, f"∂x̂{i}") for i in "₁₂₃"])
    expect_shown(page, "gᵀ J", rows[0] + rows[1], abs=2e-4)
    expect_shown(page, "backward(g)", rows[0] + rows[1], abs=2e-4)
    page.get_by_text("한국어").click()
    sync_api.expect(page.locator("h1")).to_contain_text("연쇄 법칙", timeout=PATIENCE)
    assert float(page.get_by_role("slider").first.get_attribute("aria-valuenow")) == pytest.approx(w)


def test_lesson_2_shows_the_deviation_that_the_weight_asks_for(open_lesson):
    page = open_lesson(LESSONS[1])
    press(page, "weight γ", "ArrowRight", 2, "out_std")
    y = F.batch_norm(Tensor(np.arange(1.0, 21).reshape(20, 1)), weight=Tensor([3.0]), bias=Tensor([1.0]), training=True)
    expect_shown(page, "out_std", y.numpy().std(), rel=1e-3)
    expect_shown(page, "out_mean", y.numpy().mean(), rel=1e-3)


def test_lesson_3_moves_the_gradients_of_all_samples(open_lesson):
    page = open_lesson(LESSONS[2])
    rng = np.random.default_rng(0)
    x, g = rng.normal(3, 2, (5, 2)).round(1), rng.normal(size=(5, 2)).round(1)
    weight = Tensor(np.array([1.5, -0.5]))
    before = read(page, "∂x")
    press(page, "x₁₁", "ArrowLeft", 20, "∂x")
    x[0, 0] -= 2
    expected = gradient(lambda t: F.batch_norm(t, weight=weight, training=True), x, g)[:, 0]
    expect_shown(page, "∂x", expected, abs=1e-4)
    expect_shown(page, "their sum", expected, abs=1e-4)
    assert (read(page, "∂x") != before).all()


def test_lesson_4_normalises_by_the_batch_and_by_the_running_statistics(open_lesson):
    page = open_lesson(LESSONS[3])
    press(page, "N", "ArrowRight", 2, "train()")
    x = np.array([[4.0], [1.0], [6.0], [2.5], [3.5], [9.0], [-2.0]])
    expect_shown(page, "train()", F.batch_norm(Tensor(x), training=True).numpy()[:, 0], abs=1e-3)
    expect_shown(page, "eval()", (x[:, 0] - 3) / 2, abs=1e-3)


def test_lesson_5_divides_the_gradient_by_the_scale_of_the_weights(open_lesson):
    page = open_lesson(LESSONS[4])
    press(page, "k", "ArrowRight", 1, "ratio")
    expect_shown(page, "k", 10)
    expect_shown(page, "ratio", 0.1, rel=1e-3)
    assert abs(read(page, "dead")[0]) < 1e-12


def test_lesson_6_clips_the_correction(open_lesson):
    page = open_lesson(LESSONS[5])
    press(page, "r max", "ArrowLeft", 8, "renorm")
    x = np.array([[4.0], [7.5], [5.0], [6.5]])
    xhat = F.batch_norm(Tensor(x), training=True).numpy()[:, 0]
    expect_shown(page, "renorm", xhat + (x.mean() - 3) / 2, abs=1e-3)
