"""The report in a browser, as a reader would see it: phone and desktop, light and dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.finished_run import Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
WIDTHS = (360, 1280)
LOOK = """<body style="margin:0">{frames}
<script>
onload = () => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(f => {{
    const page = f.contentDocument;
    const seen = [...page.querySelectorAll("figure svg")].filter(s => s.getBoundingClientRect().height > 100);
    return {{wide: f.contentWindow.innerWidth, content: page.documentElement.scrollWidth, figures: seen.length,
      ground: f.contentWindow.getComputedStyle(page.body).backgroundColor}};
  }}));
}}
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at the page as a reader would")
@pytest.mark.parametrize(("scheme", "ground"), [("light", "rgb(254, 254, 254)"), ("dark", "rgb(20, 23, 27)")])
def test_a_browser_shows_every_figure_within_the_page(finished, tmp_path, scheme, ground):
    page = html.escape((finished / "report.html").read_text())
    frames = "".join(
        f'<iframe width={width} height=3000 srcdoc="{page}" style="border:0"></iframe>' for width in WIDTHS
    )
    (tmp_path / "look.html").write_text(LOOK.format(frames=frames))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={sum(WIDTHS) + 100},3000", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    done = subprocess.run(
        [CHROMIUM, *options, f"file://{tmp_path}/look.html"], capture_output=True, text=True, timeout=300, check=True
    )
    looks = json.loads(html.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))
    figures = len(Page(finished / "report.html").figures())
    assert figures >= 6
    assert looks == [{"wide": w, "content": w, "figures": figures, "ground": ground} for w in WIDTHS]
    assert "CONSOLE" not in done.stderr
