"""Opens a report in headless Chromium and checks what a reader relies on.

    python tools/report/check_page.py REPORT.html [--sections ID …] [--models NAME …] [--screenshots FOLDER]
        [--first-screen PNG]

At phone and desktop width, light and dark: nothing on the console, nothing loaded, every plot drawn and
not empty, no text cut and no sideways scrolling of the page, text with enough contrast, filters that the
keyboard reaches and that filter; the named sections there with a plot each, and the named models in every table of a
set and every legend. Needs Chromium with its driver, and `requirements.txt`.
"""

import argparse
import base64
import pathlib
import shutil
import sys
import tempfile

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

VIEWS = [
    (name, width, height, scheme)
    for name, width, height in [("phone", 390, 844), ("desktop", 1280, 900)]
    for scheme in ["light", "dark"]
]

# Elements whose text is wider or higher than they show. What scrolls on purpose is left out.
CUT = """
return [...document.querySelectorAll('body, body *')].filter(e => {
  if (e.closest('svg') || e.closest('.scroll') || e.closest('.sr') || e.closest('.skip')) return false;
  if (['SELECT', 'OPTION', 'INPUT', 'SCRIPT', 'STYLE'].includes(e.tagName)) return false;
  if (getComputedStyle(e).display === 'inline') return false;
  return e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth + 1;
}).map(e => `${e.tagName.toLowerCase()}.${e.className}: ${e.textContent.slice(0, 60)}`)
"""

# Plots, with how much is in them, and labels that leave the drawing or lie on one another.
PLOTS = """
return [...document.querySelectorAll('.plot svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const labels = [...svg.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  const outside = labels.filter(([, r]) =>
    r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1);
  const over = labels.filter(([, a], i) => labels.some(([, b], j) => i < j &&
    a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2));
  const size = labels.length ? Math.min(...labels.map(([, r]) => Math.min(r.height, r.width * 10))) : 0;
  return {
    width: box.width, height: box.height, size,
    marks: svg.querySelectorAll('circle, rect, polyline, polygon, path, line').length,
    labels: labels.length,
    outside: outside.map(([t]) => t), over: over.map(([t]) => t),
  };
})
"""

# Text on its background, by WCAG 2's contrast ratio.
CONTRAST = """
const channel = c => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const parse = s => s.match(/[\\d.]+/g).map(Number);
const background = e => {
  for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const seen = new Map();
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('.sr') || e.closest('.skip')) continue;
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
  const style = getComputedStyle(e);
  const ink = parse(e.closest('svg') ? style.fill : style.color);
  const [a, b] = [light(ink), light(background(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) seen.set(`${e.tagName}.${e.getAttribute('class')}`, ratio.toFixed(2));
}
return [...seen]
"""


class Check:
    def __init__(self):
        self.failures = []

    def __call__(self, holds, what):
        if not holds:
            self.failures.append(what)
            print("  FAILED:", what)


def browser(profile):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for flag in [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}",
    ]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    return webdriver.Chrome(options=options, service=service)


def emulate(driver, width, height, scheme, media=""):
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": media, "features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )


def check_filters(driver, check):
    """Reaches the filters by Tab alone, and uses them."""
    samples = driver.find_elements(By.CSS_SELECTOR, ".sample")
    if not samples:
        return
    shown = lambda: sum(sample.is_displayed() for sample in samples)
    wanted = ["filter-set", "filter-show", "filter-text"]
    reached = []
    body = driver.find_element(By.TAG_NAME, "body")
    driver.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    for _ in range(200):
        webdriver.ActionChains(driver).send_keys(Keys.TAB).perform()
        active = driver.switch_to.active_element
        if active == body:
            break
        if active.get_attribute("id") in wanted:
            reached.append(active.get_attribute("id"))
            ring = active.value_of_css_property("outline-style")
            check(ring != "none", f"focus on {reached[-1]} can be seen")
        if reached == wanted:
            break
    check(reached == wanted, f"Tab reaches the filters: {reached}")
    check(shown() == len(samples), "every sample is shown at first")
    search = driver.find_element(By.ID, "filter-text")
    search.send_keys("there is no such answer")
    check(shown() == 0, "a search for what is not there shows nothing")
    count = driver.find_element(By.ID, "filter-count").text
    check(count == "0 samples", f"the count is told: {count}")
    search.send_keys(Keys.CONTROL, "a")
    search.send_keys(Keys.DELETE)
    check(shown() == len(samples), "an emptied search shows every sample")
    select = driver.find_element(By.ID, "filter-set")
    select.send_keys(Keys.ARROW_DOWN)
    name = select.get_property("value")
    expected = sum(sample.get_attribute("data-set") == name for sample in samples)
    check(0 < expected == shown(), f"the set {name} shows its {expected} samples: {shown()}")
    select.send_keys(Keys.HOME)


def check_content(driver, check, sections, models):
    for section in sections:
        plots = driver.execute_script(
            "const h = document.getElementById(arguments[0]);"
            "return h && [...h.closest('section').querySelectorAll('.plot svg')].length", section)
        check(plots, f"section {section} is there, with a plot: {plots}")
    heads = driver.execute_script(
        "return [...document.querySelectorAll('h3[id^=set-] ~ .scroll:not(details .scroll) thead')].map(t => t.textContent)")
    legend = driver.execute_script("return document.querySelector('.legend')?.textContent ?? ''")
    for model in models:
        check(heads and all(model in head for head in heads), f"every set has a column {model}: {heads[:3]}")
        check(model in legend, f"the legend names {model}: {legend}")
    ticks = driver.execute_script(
        "return [...document.querySelectorAll('main *, footer *')].filter(e => !e.closest('.sample') && "
        "[...e.childNodes].some(n => n.nodeType === 3 && n.data.includes('`'))).map(e => e.textContent.slice(0, 60))")
    check(not ticks, f"no backtick is shown as it is: {ticks[:3]}")


def check_view(driver, check, name, screenshots):
    for details in driver.find_elements(By.TAG_NAME, "details"):
        driver.execute_script("arguments[0].open = true", details)
    cut = driver.execute_script(CUT)
    check(not cut, f"no text is cut: {cut[:5]}")
    wide = driver.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    check(wide[0] <= wide[1], f"the page does not scroll sideways: {wide}")
    plots = driver.execute_script(PLOTS)
    check(len(plots) > 0, "there are plots")
    for index, plot in enumerate(plots):
        check(plot["width"] > 200 and plot["height"] > 40, f"plot {index} has a size: {plot}")
        check(plot["marks"] >= 6 and plot["labels"] >= 3, f"plot {index} is not empty: {plot}")
        check(not plot["outside"], f"plot {index}: labels inside the drawing: {plot['outside']}")
        check(not plot["over"], f"plot {index}: labels apart: {plot['over']}")
        check(plot["size"] >= 9, f"plot {index}: labels can be read: {plot['size']:.1f} px high")
    faint = driver.execute_script(CONTRAST)
    check(not faint, f"contrast of text is 4.5 or more: {faint}")
    for details in driver.find_elements(By.TAG_NAME, "details"):
        driver.execute_script("arguments[0].open = false", details)
    if screenshots:
        size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        shoot(driver, screenshots / f"{name}.png", size["width"], size["height"])


def shoot(driver, path, width, height):
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    path.write_bytes(base64.b64decode(shot["data"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--sections", nargs="*", default=[], help="ids of headings whose sections must have a plot")
    parser.add_argument("--models", nargs="*", default=[], help="models that every set must show")
    parser.add_argument("--screenshots", type=pathlib.Path, help="put a picture of each view there")
    parser.add_argument("--first-screen", type=pathlib.Path, help="put a picture of what is seen first there")
    arguments = parser.parse_args()
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    check = Check()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        driver = browser(profile)
        try:
            for name, width, height, scheme in VIEWS:
                print(f"{name}, {scheme}: {width} × {height}")
                emulate(driver, width, height, scheme)
                driver.get(arguments.report.resolve().as_uri())
                loaded = driver.execute_script(
                    "return performance.getEntriesByType('resource').map(e => e.name)"
                    ".filter(n => !n.startsWith('data:'))"
                )
                check(not loaded, f"nothing is loaded: {loaded}")
                broken = driver.execute_script(
                    "document.querySelectorAll('img').forEach(i => i.loading = 'eager');"
                    "return Promise.all([...document.images].map(i => i.decode().then(() => null, () => i.alt)))"
                    ".then(all => all.filter(Boolean))"
                )
                check(not broken, f"every picture is shown: {broken[:3]}")
                check_content(driver, check, arguments.sections, arguments.models)
                check_view(driver, check, f"{name}-{scheme}", arguments.screenshots)
                if arguments.first_screen and (width, scheme) == (1280, "light"):
                    shoot(driver, arguments.first_screen, width, 1240)
                check_filters(driver, check)
                console = [entry["message"] for entry in driver.get_log("browser")]
                check(not console, f"nothing on the console: {console}")
        finally:
            driver.quit()
    if check.failures:
        sys.exit(f"{len(check.failures)} checks failed")
    print("the page is as it should be")


main()
