"""The dashboards, drawn with Grafana's own UI library from a real Prometheus that scrapes real training.

Needs npm, the network and a browser, so it belongs to the long tests.
"""

import json
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from tests.monitor.test_cluster_monitoring import DASHBOARDS, ROOT, prometheus, targets  # noqa: F401  fixtures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not shutil.which("npm"), reason="npm is not installed"),
    pytest.mark.skipif(
        not shutil.which("chromium"), reason="chromium is not installed (Debian package chromium)"
    ),
    pytest.mark.skipif(
        not (shutil.which("prometheus") and shutil.which("promtool")),
        reason="prometheus and promtool are not installed (Debian package prometheus)",
    ),
]
WIDTH, CELL = 1300, 38  # pixels; of a row of Grafana's grid


def test_every_panel_is_drawn_and_the_pages_do_not_complain(prometheus, tmp_path):  # noqa: F811
    names = [path.stem for path in DASHBOARDS]
    script = ROOT / "scripts/dashboard_pictures/draw.py"
    options = ["--prometheus", f"http://{prometheus}", "--minutes", "0.5", "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, script, *options, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no data" not in done.stdout
    for path in DASHBOARDS:
        picture = Image.open(tmp_path / f"grafana_{path.stem}.png").convert("RGB")
        panels = json.loads(path.read_text())["panels"]
        assert picture.width == WIDTH
        for panel in panels:
            place = panel["gridPos"]
            left, top = place["x"] * (WIDTH - 8) // 24 + 8, place["y"] * CELL + 8
            size = place["w"] * (WIDTH - 8) // 24 - 8, place["h"] * CELL - 8
            inside = picture.crop((left, top, left + size[0], top + size[1]))
            colours = {colour for count, colour in inside.getcolors(1 << 24) if count > 3}
            # Text is grey and so is the frame; a curve or a heat map is neither.
            colourful = [c for c in colours if max(c) - min(c) > 40]
            if panel["type"] in ("timeseries", "heatmap"):
                assert colourful, f"{path.stem}: {panel['title']} is empty"
            assert len(colours) > 3, f"{path.stem}: {panel['title']}"
