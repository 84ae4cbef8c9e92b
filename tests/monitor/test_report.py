"""The report: well-formed, self-contained, right in words and numbers, clear about damage."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from sutrain.monitor.log import MetricsLog, RunLog, read_run
from sutrain.monitor.pictures import colour_scale, curves, data_uri, in_blocks, thinned
from sutrain.monitor.report import page, read_runs
from sutrain.monitor.verdicts import verdicts
from sutrain.report import main
from tests.monitor.made_up import COLUMNS, groups_of, probe_of, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a-run"
    write_run(folder, layers=6, steps=200, spike_at=(120,))
    (folder / "config.yaml").write_text("name: <script>alert(1)</script> & more\n")
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13"}))
    return folder


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """(page, summary picture) of the run, made once by the command."""
    folder = tmp_path_factory.mktemp("report")
    assert main([str(run), "--output", str(folder / "r.html"), "--picture", str(folder / "p.png")]) == 0
    return (folder / "r.html").read_text(), (folder / "p.png").read_bytes()


def texts(folder) -> str:
    return "\n".join(verdict.text for verdict in verdicts(read_run(folder)))


def test_the_page_is_well_formed_and_needs_nothing_from_outside(made):
    text, picture = made
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert not re.search(r"https?://|//[a-z]", re.sub(r"data:[^\"]*", "", text))
    assert not root.findall(".//script") and not root.findall(".//iframe")
    images = [image.get("src") for image in root.iter("img")]
    assert len(images) == 6  # curves, four heat maps, outside the layers
    for image in images:
        ElementTree.fromstring(base64.b64decode(image.removeprefix("data:image/svg+xml;base64,")))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text
    assert picture.startswith(b"\x89PNG")


def test_final_numbers_are_those_of_the_log(run, made):
    log = read_run(run)
    root = ElementTree.fromstring(made[0].removeprefix("<!DOCTYPE html>\n"))
    table = {row[0].text: row[1].text for row in root.iter("tr") if len(row) == 2 and row[0].tag == "td"}
    assert table["steps"] == table["updates applied"] == "200"
    assert table["tokens"] == f"{200 * 16 * 128:,}"
    assert table["validation loss (nats/token)"] == f"{log.evaluations[-1]['validation_loss']:.4f}"
    assert table["unigram baseline"] == "6.20%"
    assert table["loss spikes"] == "1" and table["steps with update spikes"] == "1"
    losses = [step["loss"] for step in log.steps[-10:]]
    assert table["training loss, end (nats/token)"] == f"{np.median(losses):.4f}"


def test_several_runs_stand_in_one_page(tmp_path):
    write_run(tmp_path / "a-run", layers=1, steps=20, evaluate_every_steps=10)
    write_run(tmp_path / "other", layers=2, steps=30)
    text = page(read_runs([tmp_path / "a-run", tmp_path / "other"]))
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert len(list(root.iter("img"))) == 1 + 2 * 5
    assert text.count("<li") > 10 and "a-run" in text and "other" in text


def of_losses(path, losses) -> str:
    log = RunLog(path, steps=[{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)])
    return "\n".join(f"{verdict.level}: {verdict.text}" for verdict in verdicts(log))


def test_one_easy_batch_is_not_the_level_that_the_loss_had_been_at(tmp_path):
    losses = [6.6 + 2 * math.exp(-step / 20) for step in range(200)]
    losses[118] = 5.4
    text = "from 8.198 to 6.600 nats per predicted token"
    assert f"good: Training loss went {text}." in of_losses(tmp_path, losses)
    losses[150:] = [7.7] * 50
    assert re.search(
        r"bad: .* to 7.700 .*, but it had been at 6.60. \(about step 1[0-4]\d\)", of_losses(tmp_path, losses)
    )


def test_the_picture_of_one_part_is_coloured_by_that_part(tmp_path):
    """Norms move a thousand times as little here as the mixers, which are drawn."""
    write_run(tmp_path, layers=3, steps=30)
    log = read_run(tmp_path)
    values = log.heat_map("update_norm", "mixer")[2]
    scale = colour_scale([log], "update_norm", ["mixer"])
    assert (scale.vmin, scale.vmax) == pytest.approx(np.quantile(values, (0.005, 0.995)))
    assert colour_scale([log], "update_norm").vmin < 0.5 * scale.vmin
    assert colour_scale([log], "update_norm", []) is None


def test_runs_of_one_name_are_told_apart(tmp_path):
    for place in ("x", "y"):
        write_run(tmp_path / place / "run", layers=1, steps=20)
    assert list(read_runs([tmp_path / "x" / "run", tmp_path / "y" / "run"])) == ["x/run", "y/run"]


def test_words_for_a_good_run(run):
    found = texts(run)
    assert "All 200 steps done, 200 updates applied, 409,600 tokens" in found
    assert re.search(r"Training loss went from 7\.\d+ to 4\.\d+", found)
    assert "7.2 times the unigram baseline of 6.2%" in found
    assert "Updates spiked on 1 step(s) (step 120)" in found
    assert "The loss spiked on 1 step(s) (step 122); 1 of them within 20 steps after an update spike" in found
    assert "of layer 0 moved most and that of layer 5 least" in found


def rewritten(folder, run, change):
    folder.mkdir()
    with open(run / "metrics.jsonl") as old, open(folder / "metrics.jsonl", "w") as new:
        for line in old:
            record = json.loads(line)
            change(record)
            new.write(json.dumps(record) + "\n")
    return texts(folder)


def test_words_for_trouble(run, tmp_path):
    def not_finite(record):
        if record["kind"] == "step" and record["step"] >= 150:
            record["loss"] = "NaN"

    def no_better_than_counting(record):
        if "validation_accuracy" in record:
            record["validation_accuracy"] = 0.06

    def slow(record):
        if record["kind"] == "step" and record["step"] > 180:
            record.update(tokens_per_second=3000.0, data_wait_seconds=3.0)

    def flat(record):
        if record["kind"] == "step":
            record["loss"] = 8.0

    def overfit(record):
        if record["kind"] == "evaluation":
            record["validation_loss"] = 3 + record["step"] / 100

    def stopped(record):
        if record["kind"] == "run":
            record["total_steps"] = 1000
        record["skipped_steps_total"] = 7
        record["refused_steps_total"] = 4

    found = rewritten(tmp_path / "a", run, not_finite)
    assert "not finite on 51 step(s), first on step 150" in found
    assert "no more than the unigram baseline" in rewritten(tmp_path / "b", run, no_better_than_counting)
    found = rewritten(tmp_path / "c", run, slow)
    assert "The last tenth of the run was slower" in found and "waiting for data" in found
    assert "it did not fall" in rewritten(tmp_path / "d", run, flat)
    assert "Validation loss is rising" in rewritten(tmp_path / "e", run, overfit)
    found = rewritten(tmp_path / "f", run, stopped)
    assert "200 of 1,000 steps done, 189 updates applied" in found
    assert "7 updates (3.5%) were skipped" in found and "4 updates (2.0%) were refused" in found
    assert data_uri(curves(read_runs([tmp_path / "a"])))  # and a broken loss can be drawn


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_that_has_just_begun_can_be_reported(tmp_path, steps):
    groups = groups_of(3)
    sums = np.ones((len(groups.names), len(COLUMNS)))
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            sums[:, 2] = 1 if step == 1 else np.nan
            log.step({"step": step, "loss": 2.0}, groups.table(sums, COLUMNS))
    assert main([str(tmp_path), "--picture", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "report.html").exists()
    found = verdicts(read_run(tmp_path))
    assert f"{steps} step(s) are too few to judge the loss." in [verdict.text for verdict in found]
    assert not [verdict for verdict in found if verdict.level == "bad" or "moved most" in verdict.text]


def test_a_torn_line_is_tolerated_and_said(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"kind": "ste')
    assert "the last line (206) is torn" in texts(tmp_path)


def test_damage_is_one_line_on_stderr_and_a_failing_exit(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("hello\nworld\n")
    for folder, words in ((tmp_path, "line 1"), (tmp_path / "nowhere", "no such file")):
        command = [sys.executable, "-m", "sutrain.report", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stdout == ""
        assert words in done.stderr and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


def test_thinning_keeps_every_spike_and_blocks_keep_their_place():
    x, y = np.arange(10_000.0), np.zeros(10_000)
    y[4321] = 7
    xs, _, _, high = thinned(x, y, 100)
    assert len(xs) == 100 and high.max() == 7 and abs(xs[high.argmax()] - 4321) < 60
    values = np.full((1, 10), 4.0)
    values[0, 8:] = (1.0, np.nan)
    means, edges = in_blocks(values, np.arange(11.0), 4)
    assert edges.tolist() == [0, 3, 6, 9, 10]
    np.testing.assert_allclose(means[0, :3], [4, 4, 16 ** (1 / 3)])
    assert np.isnan(means[0, 3])


@pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed (Debian package chromium)"
)
def test_a_browser_opens_the_page_without_complaint(made, tmp_path):
    (tmp_path / "report.html").write_text(made[0])
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--log-level=0"]
    command += ["--window-size=1200,1500", f"--screenshot={tmp_path / 'shot.png'}"]
    done = subprocess.run(
        [*command, f"file://{tmp_path / 'report.html'}"], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    pixels = matplotlib.image.imread(tmp_path / "shot.png")[..., :3]
    assert pixels.shape == (1500, 1200, 3)
    saturation = pixels.max(axis=2) - pixels.min(axis=2)
    assert (saturation > 0.5).mean() > 0.0005  # the curves are drawn: strong blue on white


def test_an_update_that_begins_to_grow_with_depth_is_said_with_its_slope_and_step(tmp_path):
    groups = groups_of(12)
    depth = np.array([int(groups.keys[g][0] or 0) + 1.0 for g in groups.group_of_T])
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        for step in range(1, 101):
            sums = np.ones((len(groups.names), len(COLUMNS)))
            sums[:, 2] = depth ** (0.0 if step <= 60 else 1.8)
            log.step({"step": step, "loss": 5.0 - 0.01 * step}, groups.table(sums, COLUMNS))
    found = re.search(r"mixer layers grows with depth: slope \+0\.9, from step (\d+) on", texts(tmp_path))
    assert found and 55 <= int(found.group(1)) <= 62


def test_probes_are_drawn_and_judged(tmp_path):
    write_run(tmp_path / "a", layers=3, steps=30)
    with MetricsLog(tmp_path / "a" / "metrics.jsonl", resume_from_step=30) as log:
        for step in range(1, 21):
            entropy = [3.0, 3.0 if step < 20 else 0.01, 2.0]
            change = 0.01 if step < 15 else 0.2
            log.probe({**probe_of(3), "step": step, "model_update": change, "attention_entropy": entropy})
    found = texts(tmp_path / "a")
    assert "One update changes the function 20.0 times as much as in the first half" in found
    assert "collapsed onto single tokens in layer 1" in found
    assert page(read_runs([tmp_path / "a"])).count("<img") == 6 + 2


def test_what_the_data_was_stands_in_the_report(tmp_path):
    write_run(tmp_path, layers=1, steps=20)
    text = (tmp_path / "metrics.jsonl").read_text()
    data = '"data": {"splits": {"train": {"rows": 12345, "documents": 678, "tokens": 9}}}, "world_size"'
    (tmp_path / "metrics.jsonl").write_text(text.replace('"world_size"', data, 1))
    assert "<td>train</td><td>678</td><td>12,345</td><td>9</td>" in page(read_runs([tmp_path]))
