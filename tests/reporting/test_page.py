"""The page in headless Chromium: every picture drawn, nothing asked for, readable on a phone, and hostile text that does nothing."""

import shutil
import socket

import pytest

from panacea_jax.reporting.report import write_report
from tests.reporting.browser import browsing, find_browser
from tests.reporting.folders import HOSTILE, METHODS, write_compared, write_run, write_swept

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")

DRAWN = "[...document.querySelectorAll('.chart')].map(c => [c.dataset.chart, c.querySelectorAll('svg [role=graphics-symbol]').length])"
OUTSIDE = """[...document.querySelectorAll('body *')].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg')).map(e => e.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def browser():
    with browsing() as page:
        yield page


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The page of a comparison whose folder is hostile too; the sources are gone when it is opened."""
    root = tmp_path_factory.mktemp("report") / "<img src=x onerror=alert(9)>"
    out = tmp_path_factory.mktemp("page")
    page = write_report(write_compared(root), out=out / "sent", show_records=True)
    shutil.rmtree(root)
    return page


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return write_report(write_swept(tmp_path_factory.mktemp("sweep")), show_records=True)


def test_every_picture_is_drawn_and_nothing_is_asked_for(browser, compared):
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(compared)
    drawn = dict(browser.value(DRAWN))
    curves = {"curve_loss", "curve_harmful_loss", "curve_cos_gh", "curve_validation_loss", "layers_mean"}
    assert {"hs", "hs_plus", "fa", "benign", "hs_fa", "hs_benign", "map_hs", "over_fa", *curves} <= drawn.keys()
    # Every outcome has a mark, a cell of the grid each: nothing is lost between the table and the picture.
    assert drawn["hs"] >= 1 + 2 * len(METHODS) and drawn["hs_fa"] >= 1 + len(METHODS) and drawn["map_hs"] >= 6
    assert all(drawn.values())
    assert browser.requests == [compared.as_uri()]
    assert browser.complaints == []


def test_hostile_text_is_shown_and_does_nothing(browser, compared):
    browser.open(compared)
    for details in ("Stages", "Inputs", "Commands"):
        assert details in browser.value("document.body.textContent")
    assert browser.dialogs == []
    assert browser.value("document.title").startswith("Report: sent") is False
    assert browser.value("document.title") == "Report: <img src=x onerror=alert(9)>"
    assert browser.value("[...document.querySelectorAll('details')].filter(d => d.open).length") == 0
    assert browser.value("document.querySelectorAll('main img, main script, main style, main base, main iframe').length") == 0
    # Opened, too: what was written is there letter by letter, and what acts is spelt out.
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    cells = browser.value("[...document.querySelectorAll('.foreign td')].map(c => c.textContent)")
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[5], HOSTILE[6], HOSTILE[7]):
        assert text in cells
    assert "\\x1b]0;taken\\x07\\x1b[2J\\x1b[31mred" in cells
    assert any("\\u202e" in cell and "\\u200b" in cell for cell in cells)
    assert not any(c in browser.value("document.documentElement.outerHTML") for c in "\x1b\x07\u202e\u2066\u200b")
    assert browser.value("getComputedStyle(document.body).display") == "block"
    assert browser.dialogs == [] and browser.value("document.title").startswith("Report: <img")


def test_the_policy_stops_what_gets_in_all_the_same(browser, compared):
    """As if something had not been escaped: no script of others runs, and nobody is called."""
    browser.open(compared)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        browser.value(f"""(() => {{
          const script = document.createElement('script'); script.textContent = "document.title = 'taken'"; document.body.append(script);
          document.body.insertAdjacentHTML('beforeend', '<img src="{url}/x.png" onload="document.title = 1" onerror="document.title = 2">');
          return fetch('{url}/').then(() => 'sent', () => 'refused');
        }})()""")
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert browser.value("document.title").startswith("Report:")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_read_on_a_phone(browser, compared, scheme):
    browser.open(compared, width=375, height=700, scheme=scheme)
    browser.value("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.value("document.documentElement.scrollWidth") <= 375
    assert browser.value(OUTSIDE) == []
    assert browser.value("Math.max(...[...document.querySelectorAll('.chart svg')].map(s => s.getBoundingClientRect().right))") <= 375
    assert browser.value("Math.min(...[...document.querySelectorAll('svg .mark-rule, svg .mark-symbol')].length ? [1] : [0])") == 1
    # The words of page and pictures are told from the paper in both schemes.
    ink = "getComputedStyle(document.querySelector('{}')).{}"
    paper = browser.value(ink.format("body", "backgroundColor"))
    label = browser.value(ink.format("svg .role-axis-label text", "fill"))
    assert label == browser.value(ink.format("body", "color"))
    assert (_lightness(label) > _lightness(paper) + 150) if scheme == "dark" else (_lightness(paper) > _lightness(label) + 150)


def _lightness(colour):
    """Of "rgb(1, 2, 3)", 0 to 255."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_the_keyboard_reaches_everything(browser, compared):
    browser.open(compared)
    seen = []
    for _ in range(60):
        browser.press("Tab")
        seen.append(browser.value("document.activeElement.className || document.activeElement.tagName"))
    assert seen[0] == "skip" and "scroll" in seen and "SUMMARY" in seen
    browser.value("document.querySelector('summary').focus()")
    browser.press("Enter")
    assert browser.value("document.querySelector('details').open") is True


def test_names_that_are_markup_do_nothing_in_pictures(browser, tmp_path):
    """Nor in what a pointer on a point is told."""
    name = "<img src=x onerror=alert(5)>\u202e"
    write_run(tmp_path / name, 3, 4)
    write_run(tmp_path / "other", 6, 4)
    browser.complaints.clear()
    browser.open(write_report(tmp_path, show_records=True))
    place = browser.value("""(() => {
      const point = document.querySelector('[data-chart=hs] .mark-symbol.role-mark path'); point.scrollIntoView({block: 'center'});
      const at = point.getBoundingClientRect(); return [at.x + at.width / 2, at.y + at.height / 2]; })()""")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    told = browser.value("document.querySelector('#vg-tooltip-element').textContent")
    assert "<img src=x onerror=alert(5)>\\u202e" in told and "30.0" in told
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.dialogs == [] and browser.complaints == []


def test_a_sweep_has_its_maps(browser, swept):
    browser.complaints.clear()
    browser.open(swept)
    drawn = dict(browser.value(DRAWN))
    titles = browser.value("[...document.querySelectorAll('figcaption')].map(f => f.textContent)")
    assert any(title.startswith("HS (%): panacea") and "learning_rate" in title for title in titles)
    assert all(drawn.values()) and browser.complaints == []
    assert "diverged at step 3" in browser.value("document.body.textContent")
