"""The page of a comparison: it holds all it needs, names do no harm, and a real browser sorts, hides and hovers."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from folders import finished, lines, write_run

from lockstep.report.comparison import group_runs, read_runs
from lockstep.report.comparison_page import write_comparison_page
from lockstep.report.tables import group_table, paired_table, parting_table, settings_table

HOSTILE = "<script>document.title='x'<b> $$x$$ @run $name {{ 7 * 7 }} \"';--"


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three groups, the second of a run that has only begun; the first has a hostile name and so has a setting."""
    write_run(tmp_path / "runs" / HOSTILE, finished(0.2), lines([0.1, 0.2]), data__source="folder:</script><i>")
    write_run(tmp_path / "runs" / "begun", None, [], model__dropout=0.5, data__source="folder:" + "x" * 80)
    write_run(tmp_path / "runs" / "zoo", finished(0.1), lines([0.1, 0.1]), optim__lr=0.5)
    runs = read_runs(sorted((tmp_path / "runs").iterdir()))
    groups = group_runs(runs)
    tables = [group_table(groups), settings_table(groups), paired_table(groups), parting_table(runs)]
    write_comparison_page(groups, [table for table in tables if table.rows], tmp_path / "page.html")
    return tmp_path / "page.html"


def test_the_page_asks_nobody_for_anything_and_escapes_names(page: Path) -> None:
    text = page.read_text()
    assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=", text) == []
    (policy,) = re.findall(r'Content-Security-Policy"\s+content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'") and "http" not in policy and "eval" not in policy
    assert "<script>document.title" not in text and "</script><i>" not in text
    assert "&lt;script&gt;document.title" in text and "{{ 7 * 7 }}" in text
    assert text.count("<table>") == 2 and 'name="viewport"' in text


_PROBE = """<script>
const found = {errors: [], blocked: []};
addEventListener("error", event => found.errors.push(event.message));
addEventListener("securitypolicyviolation", event => found.blocked.push(event.blockedURI));
const pause = () => new Promise(resolve => setTimeout(resolve, 300));
const within = (root, selector) => [...root.querySelectorAll(selector),
  ...[...root.querySelectorAll("*")].flatMap(e => e.shadowRoot ? within(e.shadowRoot, selector) : [])];
const column = number => [...document.querySelectorAll("tbody")[0].rows].map(row => row.cells[number].textContent);
addEventListener("load", async () => {
  await pause();
  const plot = Bokeh.documents[0].roots()[0], line = plot.renderers[0].data_source.data;
  const {x_scale, y_scale} = Bokeh.index[plot.id].frame, area = within(document, ".bk-events")[0];
  const {left, top} = area.getBoundingClientRect();
  area.dispatchEvent(new PointerEvent("pointermove", {isPrimary: true, pointerType: "mouse", bubbles: true,
    clientX: left + x_scale.compute(line.epoch[1]), clientY: top + y_scale.compute(line.value[1])}));
  await pause();
  found.hover = within(document, ".bk-tooltip-row-value").map(value => value.textContent.trim());
  const [accuracy, label] = ["test accuracy", "group"].map(name =>
    [...document.querySelectorAll("th button")].find(button => button.textContent === name));
  found.sorted = [accuracy, accuracy, label].map(button => (button.click(), column(1)));
  document.querySelector(".legend button").click();
  found.visible = plot.renderers.map(drawn => drawn.visible);
  found.title = document.title;
  found.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  found.wider = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const place = document.createElement("pre");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>"""


def in_browser(page: Path, width: int) -> tuple[dict[str, Any], str]:
    """What the probe finds, and what the browser's console says."""
    probed = page.with_name("probed.html")
    probed.write_text(page.read_text().replace("<head>", "<head>" + _PROBE, 1))
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    more = ["--virtual-time-budget=20000", f"--window-size={width},1200", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([*command, *more, probed.as_uri()], capture_output=True, text=True, timeout=120)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[bokeh" not in line]
    return json.loads(html.unescape(found)), "\n".join(console)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_sorts_hides_and_hovers_without_an_error_or_a_request(page: Path) -> None:
    found, console = in_browser(page, width=500)
    assert (console, found["errors"], found["blocked"], found["requests"]) == ("", [], [], [])
    assert found["title"] == "Comparison of 3 runs"
    assert found["hover"][:5] == [HOSTILE, HOSTILE, "2.00", "20", "20.00 %"]
    # By accuracy up and down, what has none at the end both times; then by name.
    assert found["sorted"] == [["zoo", HOSTILE, "begun"], [HOSTILE, "zoo", "begun"], [HOSTILE, "begun", "zoo"]]
    assert found["visible"] == [False, True, True]
    assert found["wider"] == 0, "only tables scroll sideways"
