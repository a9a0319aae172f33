"""The page in a real browser: opened, clicked, used by keyboard, and its numbers read back.

Needs the extra `browser` and Debian's chromium; skipped without them, unless TINYGRAD_BN_BROWSER=required.
"""

import os
import shutil

import numpy as np
import pytest

from demos import mnist_cnn
from tests.framework.test_explain_show import Net, explained_twice
from tests.tools.explained import explained
from tinygrad_bn import Tensor, functional, grad, nn
from tinygrad_bn.explain import explain

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if os.environ.get("TINYGRAD_BN_BROWSER") == "required":
    import axe_playwright_python.sync_playwright as axe
    import playwright.sync_api as sync_api
else:
    why = "needs pip install 'tinygrad-bn[browser]'"
    sync_api = pytest.importorskip("playwright.sync_api", reason=why)
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason=why)
    if CHROMIUM is None:
        pytest.skip("needs chromium", allow_module_level=True)

VIEWS = [(1200, 900, "light"), (1200, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]
CONTRAST = """([one, other]) => {
  const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4
  const light = c => {
    const [r, g, b] = c.match(/\\d+/g).map(v => linear(v / 255))
    return .2126 * r + .7152 * g + .0722 * b
  }
  const [a, b] = [light(one), light(other)].sort((x, y) => y - x)
  return (a + .05) / (b + .05)
}"""
EDGES = "x => { const r = x.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] }"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def e():
    return explained()[0]


@pytest.fixture(params=VIEWS, ids=lambda v: f"{v[0]}-{v[2]}")
def page(request, browser, e, tmp_path):
    width, height, scheme = request.param
    yield from opened(browser, e.html(tmp_path / "page.html"), width, height, scheme)


def opened(browser, path, width, height, scheme):
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, wrong = context.new_page(), []
    page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else wrong.append(r.url))
    page.goto(path.as_uri())
    yield page
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "the page itself scrolls sideways"
    context.close()


def read(page, name):
    rows = page.query_selector_all(f"#panel table[aria-label={name}] tr")
    return [[float(td.get_attribute("title")) for td in row.query_selector_all("td")] for row in rows]


def rows(a):
    return np.atleast_2d(a)[:12, :8].tolist()


def step(page, key):
    return page.locator(f'[data-key="{key}"]')


def test_numbers_by_keyboard(page, e):
    for name, key in (("1.xhat", "Enter"), ("1.var", "Space"), ("x", "Enter")):
        step(page, name).focus()
        page.keyboard.press(key)
        assert page.locator("#panel h2").inner_text() == name
        assert read(page, "value") == rows(e[name].value)
        assert read(page, "gradient") == rows(e[name].grad)
    page.keyboard.press("Escape")
    assert page.locator("#panel").is_hidden()
    assert page.evaluate("document.activeElement.dataset.key") == "x", "the focus is where it was"


def test_arrows_follow_the_edges(page):
    step(page, "1.sqrtvar").focus()
    for key, want in (("ArrowRight", "1.ivar"), ("ArrowDown", "1.xhat"), ("ArrowLeft", "1.xmu"), ("ArrowUp", "box:0")):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.dataset.key") == want


def test_a_click_shows_the_formula_and_where_it_came_from(page, e):
    step(page, "1.ivar").click()
    panel = page.locator("#panel")
    for part in e["1.ivar"].formula.split(":  "):  # the call by names, and the rule
        assert " ".join(part.split()) in " ".join(panel.inner_text().split())
    panel.get_by_role("button", name="1.sqrtvar", exact=True).click()
    assert panel.locator("h2").inner_text() == "1.sqrtvar"
    panel.get_by_role("button", name="Close").click()
    assert panel.is_hidden()


def test_boxes_open_and_fold(page):
    assert step(page, "softmax_cross_entropy.log_sum").count() == 0
    step(page, "box:softmax_cross_entropy").click()
    assert step(page, "softmax_cross_entropy.log_sum").count() == 1
    assert page.evaluate("document.activeElement.dataset.key") == "title:softmax_cross_entropy"
    page.keyboard.press("Enter")
    assert step(page, "softmax_cross_entropy.log_sum").count() == 0
    page.click("#fold-all")
    assert step(page, "1.xhat").count() == 0
    step(page, "box:1").focus()
    page.keyboard.press("Enter")
    assert step(page, "1.xhat").count() == 1
    page.click("#open-all")
    assert step(page, "3.out").count() == 1


def test_paths_light_up_and_their_shares_sum(page, e):
    page.select_option("#of", "0.out")
    shares = list(e["0.out"].paths.values())

    def table(name):
        found = page.query_selector_all(f"#way table[aria-label='{name}'] tr")
        return [[float(td.get_attribute("title")) for td in row.query_selector_all("td")] for row in found]

    for i in range(4):
        page.click("#next")
        assert page.locator("#way h2").inner_text() == f"Path {i + 1} of 4"
        assert table("Share of this path") == rows(shares[i])
        np.testing.assert_allclose(table("Sum of the paths so far"), rows(sum(shares[: i + 1])), atol=1e-15)
        lit = page.evaluate("[...document.querySelectorAll('.edge.lit')].map(e => e.dataset.edge)")
        assert ("0.out|1.xmu" in lit) == (i < 2)
        assert ("0.out|1.mu" in lit) == (i >= 2)
        assert ("1.sq|1.var" in lit) == (i % 2 == 1)
    np.testing.assert_allclose(table("Sum of the paths so far"), rows(e["0.out"].grad), atol=1e-15)
    page.click("#done")
    assert page.locator(".edge.lit").count() == 0


def test_everything_is_reached_and_named(page):
    for x in page.query_selector_all("[tabindex='0'], button, select, summary"):
        name = x.get_attribute("aria-label") or x.inner_text() or x.get_attribute("id")
        assert name
    assert page.locator("html").get_attribute("lang") == "en"
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(x => x.id)")
    assert len(ids) == len(set(ids))
    for text, ground in (
        ("#graph text.small", "#graph"),
        ("p", "body"),
        ("button", "button"),
        (".title text", ".module"),
    ):
        colour = "x => { const s = getComputedStyle(x); return x instanceof SVGElement ? s.fill : s.color }"
        back = "x => { const s = getComputedStyle(x); return x instanceof SVGElement ? s.fill : s.backgroundColor }"
        seen = [page.eval_on_selector(text, colour), page.eval_on_selector(ground, back)]
        assert page.evaluate(CONTRAST, seen) >= 4.5, (text, seen)
    page.click("#more summary")
    assert page.locator("#memory").inner_text().startswith("layer")


def batch_norm():
    bn, rng = nn.BatchNorm1d(2).astype(np.float64), np.random.default_rng(0)
    return explain(bn, rng.normal(2, 1.5, (5, 2)), g=rng.normal(size=(5, 2)))


def article_cnn():
    rng = np.random.default_rng(0)
    model, x = mnist_cnn.build(0), rng.normal(size=(8, 1, 28, 28)).astype(np.float32)
    with explain() as e:
        functional.cross_entropy(model(x), rng.integers(0, 10, 8)).backward()
    return e


def second_derivative():
    x = Tensor(np.random.default_rng(0).normal(size=(5, 2)), requires_grad=True)
    with explain() as e:
        y = functional.batch_norm(x, training=True)
        dx = grad((y**3).sum(), x, create_graph=True)
        (dx * dx).sum().backward()
    return e


PAGES = [(make, view) for make in (batch_norm, article_cnn, second_derivative) for view in VIEWS]


@pytest.fixture(params=PAGES, ids=lambda p: f"{p[0].__name__}-{p[1][0]}-{p[1][2]}")
def any_page(request, browser, tmp_path):
    make, view = request.param
    yield from opened(browser, make().html(tmp_path / "page.html"), *view)


def test_axe_finds_no_barrier(any_page):
    page = any_page
    page.click("#next")
    page.locator(".node").nth(3).focus()
    page.keyboard.press("Enter")
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 10
    assert [(v["id"], v["help"]) for v in found["violations"]] == []


def test_no_text_is_cut_and_no_target_is_tiny(any_page):
    page = any_page
    for node in page.query_selector_all(".node"):
        left, top, right, bottom = node.query_selector("rect").evaluate(EDGES)
        assert min(right - left, bottom - top) >= 44
        for text in node.query_selector_all("text"):
            edges = text.evaluate(EDGES)
            assert edges[0] >= left, text.text_content()
            assert edges[2] <= right, text.text_content()
    for x in page.query_selector_all(".title rect, button, select, summary"):
        left, top, right, bottom = x.evaluate(EDGES)
        assert not right - left or min(right - left, bottom - top) >= 22


def test_boxes_hold_their_steps_and_no_others(any_page):
    page = any_page
    scopes = page.evaluate("Object.fromEntries(Object.entries(DATA.nodes).map(([k, n]) => [k, around(n.scope)]))")
    boxes = {x.get_attribute("data-scope"): x.evaluate(EDGES) for x in page.query_selector_all(".module")}
    for node in page.query_selector_all(".node"):
        key, (left, top, right, bottom) = node.get_attribute("data-key"), node.query_selector("rect").evaluate(EDGES)
        for scope, box in boxes.items():
            apart = right <= box[0] or left >= box[2] or bottom <= box[1] or top >= box[3]
            inside = scope in scopes.get(key, ()) or key.startswith(f"box:{scope}.")
            assert inside != apart, (key, scope)


def test_the_gradient_fills_with_what_the_paths_bring(browser, tmp_path):
    e = batch_norm()
    for page in opened(browser, e.html(tmp_path / "page.html"), 1200, 900, "light"):
        fill = "g => [...g.querySelectorAll('g')].at(-1).innerHTML"
        whole = step(page, "x").evaluate(fill)
        seen = []
        for _ in range(4):
            page.click("#next")
            seen.append(step(page, "x").evaluate(fill))
        assert len(set(seen)) >= 3, "the path through mu and var brings nothing"
        assert whole not in seen[:2]
        opacity = "g => [...[...g.querySelectorAll('g')].at(-1).children].map(r => +r.getAttribute('fill-opacity'))"
        lit = step(page, "x").evaluate(opacity)
        page.click("#done")
        np.testing.assert_allclose(lit, step(page, "x").evaluate(opacity), atol=1e-9)
        assert page.locator(".node", has_text="reshape").count() == 0, "what the layer tracks is no part of the graph"


def test_the_paths_of_a_second_derivative(browser, tmp_path):
    e = second_derivative()
    for page in opened(browser, e.html(tmp_path / "page.html"), 1200, 900, "light"):
        assert page.locator("#of option").all_inner_texts()[0] == "x"
        count = int(page.evaluate("DATA.paths.x.length"))
        for _ in range(count):
            page.click("#next")
        total = page.query_selector_all("#way table[aria-label='Sum of the paths so far'] td")
        np.testing.assert_allclose([float(td.get_attribute("title")) for td in total], e["x"].grad.ravel(), rtol=1e-10)


def test_nested_boxes_hold_each_other(browser, tmp_path):
    x = Tensor(np.random.default_rng(0).normal(size=(6, 3)), requires_grad=True)
    with explain() as e:
        Net().astype(np.float64)(x).backward(np.random.default_rng(1).normal(size=(6, 3)))
    for page in opened(browser, e.html(tmp_path / "page.html", expand="blocks.1.norm"), 1200, 900, "light"):
        assert step(page, "box:blocks.0").count() == 1
        assert step(page, "blocks.1.norm.xhat").count() == 1
        step(page, "box:blocks.0").click()
        assert step(page, "box:blocks.0.norm").count() == 1, "the box inside is folded still"
        page.click("#open-all")
        modules = [page.query_selector(f'.module[data-scope="{scope}"]') for scope in ("blocks.0", "blocks.0.norm")]
        xhat = page.query_selector('[data-key="blocks.0.norm.xhat"] rect')
        outer, inner, xhat = (x.evaluate(EDGES) for x in (*modules, xhat))
        for a, b in ((outer, inner), (inner, xhat)):
            assert a[0] < b[0]
            assert a[1] < b[1]
            assert a[2] > b[2]
            assert a[3] > b[3]
        step(page, "title:blocks.0").click()
        assert step(page, "box:blocks.0").count() == 1
        page.select_option("#of", "x")
        ways = list(e["x"].paths.steps.values())
        for way in ways[:2]:
            page.click("#next")
            lit = page.evaluate("[...document.querySelectorAll('.node.lit')].map(n => n.dataset.key)")
            assert {e.path_of(s) for s in way} <= set(lit)


def test_a_folded_box_that_is_used_twice_is_drawn(browser, tmp_path):
    pages = opened(browser, explained_twice().html(tmp_path / "page.html"), 1200, 900, "light")
    page = next(pages)
    assert page.query_selector("svg") is not None
    next(pages, None)
