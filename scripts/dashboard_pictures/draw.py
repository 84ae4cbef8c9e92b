"""Draw the shipped dashboards from a live Prometheus, for the documentation.

    python scripts/dashboard_pictures/draw.py --prometheus http://127.0.0.1:9090 --minutes 5 overview depth

asks it every query of the dashboards over the last minutes, and writes docs/pictures/grafana_NAME.png. Needs chromium
and npm (Grafana's UI library is fetched once into build/dashboard_pictures, 458 MB). `--run` and `--part` are what one
would choose at the head of the dashboard; `--rows` draws only the rows of panels whose title holds one of the words.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DASHBOARDS = ROOT / "cluster/monitoring/grafana/dashboards"
BUILD = ROOT / "build/dashboard_pictures"
POINTS = 240
"""Of a curve: what Grafana asks for at this width."""


def bundle() -> Path:
    """The page as one script; fetches the libraries when they are missing or others are wanted."""
    BUILD.mkdir(parents=True, exist_ok=True)
    wanted = (HERE / "package.json").read_text()
    stamp = BUILD / "installed"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.copy(HERE / "package.json", BUILD)
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=BUILD, check=True
        )
        stamp.write_text(wanted)
    shutil.copy(HERE / "page.tsx", BUILD)
    options = [
        "--bundle",
        "--outfile=page.js",
        "--jsx=automatic",
        '--define:process.env.NODE_ENV="production"',
    ]
    loaders = [f"--loader:.{kind}=dataurl" for kind in ("svg", "woff", "woff2", "ttf", "png")]
    command = ["node_modules/.bin/esbuild", "page.tsx", *options, *loaders, "--log-level=error"]
    subprocess.run(command, cwd=BUILD, check=True)
    return BUILD / "page.js"


def answers(
    options: argparse.Namespace, target: dict[str, Any], begin: float, end: float
) -> list[dict[str, Any]]:
    """The series of one query, as the page wants them."""
    step = max(1.0, (end - begin) / POINTS)
    expression = target["expr"].replace("$instance", options.run).replace("$part", options.part)
    expression = expression.replace("$__rate_interval", f"{max(4, math.ceil(step))}s")
    question = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": step})
    with urllib.request.urlopen(f"{options.prometheus}/api/v1/query_range?{question}", timeout=60) as reply:
        found = json.load(reply)["data"]["result"]
    series = []
    times = [begin + number * step for number in range(int((end - begin) / step) + 1)]
    for one in found:
        name = target["legendFormat"]
        for label, value in one["metric"].items():
            name = name.replace(f"{{{{{label}}}}}", value)
        known = {round((float(at) - begin) / step): float(value) for at, value in one["values"]}
        values = [known.get(number) for number in range(len(times))]
        finite = [value if value is not None and math.isfinite(value) else None for value in values]
        series.append({"name": name, "times": [1000 * at for at in times], "values": finite})
    return series


def panels_of(name: str, words: list[str]) -> list[dict[str, Any]]:
    """The panels of a dashboard, or of those of its rows that are asked for, moved up."""
    panels = json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]
    if not words:
        return panels
    kept, inside = [], False
    for panel in panels:
        if panel["type"] == "row":
            inside = any(word in panel["title"] for word in words)
        if inside:
            kept.append(panel)
    top = 0
    for number, panel in enumerate(kept):
        if panel["type"] == "row":
            block = [panel]
            for other in kept[number + 1 :]:
                if other["type"] == "row":
                    break
                block.append(other)
            shift = top - panel["gridPos"]["y"]
            for one in block:
                one["gridPos"]["y"] += shift
            top = max(one["gridPos"]["y"] + one["gridPos"]["h"] for one in block)
    return kept


def draw(name: str, options: argparse.Namespace, script: Path) -> Path:
    """Write the picture of one dashboard. Raises CalledProcessError when the browser fails, SystemExit when the page
    complains."""
    end = options.end or time.time() - 2
    begin = end - 60 * options.minutes
    panels = panels_of(name, options.rows)
    for panel in panels:
        targets = panel.get("targets", [])
        panel["series"] = [s for t in targets for s in answers(options, t, begin, end)]
        panel["title"] = panel["title"].replace("$part", options.part)
        if targets and not panel["series"]:
            print(f"{name}: no data for {panel['title']}")
    drawing = {"width": options.width, "from": 1000 * begin, "to": 1000 * end, "panels": panels}
    page = BUILD / f"{name}.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><link rel=stylesheet href=page.css>"
        "<style>body{margin:0;font-family:Inter,sans-serif}</style><div id=page></div>"
        f"<script>window.DRAWING={json.dumps(drawing)}</script><script src={script.name}></script>"
    )
    height = 38 * max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels) + 8
    picture = options.output / f"grafana_{options.prefix}{name}.png"
    browser = [
        "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--virtual-time-budget=10000", "--enable-logging=stderr", f"--window-size={options.width},{height}",
        f"--screenshot={picture}", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(browser, check=True, capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if complaints:
        raise SystemExit("\n".join([f"error: {name}: the page complains:", *complaints]))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dashboards", nargs="+", choices=sorted(p.stem for p in DASHBOARDS.glob("*.json")))
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=5.0, help="to look back over (5)")
    parser.add_argument("--end", type=float, help="of the time looked at, seconds since 1970 (now)")
    parser.add_argument("--run", default=".+", help="host:port of the run's endpoint (all runs)")
    parser.add_argument("--part", default="mixer", help="of the layers (mixer)")
    parser.add_argument("--rows", nargs="*", default=[], help="words of titles (all rows)")
    parser.add_argument("--width", type=int, default=1300, help="pixels (1300)")
    parser.add_argument("--prefix", default="", help="of the files' names")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/pictures")
    options = parser.parse_args()
    script = bundle()
    for name in options.dashboards:
        print(draw(name, options, script))


if __name__ == "__main__":
    main()
