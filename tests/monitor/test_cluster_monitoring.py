"""cluster/monitoring against a real Prometheus that scrapes a real exporter in a process of its own."""

import importlib.util
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from sutrain.monitor.series import ALL

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARD = MONITORING / "grafana" / "dashboards" / "training.json"
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian package prometheus)",
)
needs_grafana_sdk = pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None,
    reason="grafana-foundation-sdk is not installed",
)


def panels() -> list[dict]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def rules() -> list[dict]:
    files = sorted((MONITORING / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression that people will see the answer of, by where it stands, variables filled in."""
    found = {
        f"panel {panel['title']} {target['refId']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    found |= {f"rule {rule['record']}": rule["expr"] for rule in rules() if "record" in rule}
    return {
        where: text.replace("$instance", ".+").replace("$part", "mixer").replace("$__rate_interval", "1m")
        for where, text in found.items()
    }


@needs_grafana_sdk
def test_the_dashboard_is_what_its_script_makes():
    path = MONITORING / "grafana" / "make_dashboards.py"
    spec = importlib.util.spec_from_file_location("make_dashboards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert DASHBOARD.read_text() == module.text(), f"run python {path.relative_to(ROOT)}"


def test_every_panel_says_what_it_shows_and_in_what_unit():
    found = panels()
    assert len(found) >= 20
    assert len({panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]}) == len(found) + 5
    for panel in found:
        assert panel["title"] and len(panel["description"]) > 15, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


def test_only_series_that_exist_are_asked_for():
    known = {series.name for series in ALL} | {rule["record"] for rule in rules() if "record" in rule}
    text = " ".join([*expressions().values(), *(rule["expr"] for rule in rules())])
    asked = set(re.findall(r"\bsutrain[_:][a-z0-9_:]+", text))
    assert asked and asked <= known


def test_every_series_of_the_contract_is_described_in_the_documentation():
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert [series.name for series in ALL if f"`{series.name}" not in text] == []
    assert [rule["alert"] for rule in rules() if "alert" in rule and f"`{rule['alert']}`" not in text] == []


@needs_prometheus
@pytest.mark.parametrize(
    "command",
    [["check", "config", "prometheus.yml"], ["check", "rules", "rules/alerts.yml", "rules/recording.yml"],
     ["test", "rules", "rules_test.yml"]],
    ids=" ".join,
)  # fmt: skip
def test_promtool_agrees(command):
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_every_alert_has_a_unit_test():
    tested = (MONITORING / "rules_test.yml").read_text()
    for rule in rules():
        if "alert" in rule:
            assert re.search(rf"alertname: {rule['alert']}\n\s+exp_alerts", tested), rule["alert"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory):
    """Address of a Prometheus with the repository's configuration, only faster, that has seen a spike."""
    folder = tmp_path_factory.mktemp("prometheus")
    command = [sys.executable, "-m", "tests.monitor.serve", "12"]
    run = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    target = f"127.0.0.1:{run.stdout.readline().strip()}"
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(MONITORING / "rules" / "*.yml")]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    with open(folder / "log", "w") as log:
        options = {
            "config.file": folder / "prometheus.yml",
            "storage.tsdb.path": folder / "data",
            "web.listen-address": address,
            "log.level": "warn",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 40
        while True:
            try:  # long enough for two scrapes after an update spike and the loss spike that follows it
                if len(query(address, 'ALERTS{alertname=~"SutrainUpdateSpike|SutrainLossSpike"}')) >= 2:
                    break
            except OSError:
                pass
            assert time.monotonic() < deadline and server.poll() is None, (folder / "log").read_text()
            time.sleep(0.3)
        yield address
    finally:
        run.stdin.close()
        server.terminate()
        server.wait(timeout=20)
        run.wait(timeout=20)


def query(address: str, expression: str) -> list[dict]:
    parameters = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{parameters}", timeout=10) as reply:
        return json.load(reply)["data"]["result"]


@needs_prometheus
def test_every_expression_returns_data(prometheus):
    for where, expression in expressions().items():
        try:
            result = query(prometheus, expression)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{where}: {expression}: {error.read().decode()}")
        assert result, f"{where}: {expression} returns nothing"
        assert all(math.isfinite(float(sample["value"][1])) for sample in result), where
    layers = query(
        prometheus, next(e for w, e in expressions().items() if w.startswith("panel Update ÷ weight by"))
    )
    assert {sample["metric"]["layer"] for sample in layers} == {f"{layer:04d}" for layer in range(12)}


@needs_prometheus
def test_the_alarms_of_a_spiking_run_fire_and_no_others(prometheus):
    firing = {sample["metric"]["alertname"] for sample in query(prometheus, 'ALERTS{alertstate="firing"}')}
    assert firing == {"SutrainUpdateSpike", "SutrainLossSpike"}
    for rule in rules():
        if "alert" in rule:
            query(prometheus, rule["expr"])  # the others are quiet, but valid


@needs_prometheus
def test_the_number_of_series_is_what_the_exporter_promises(prometheus):
    from sutrain.monitor.exporter import series_count
    from tests.monitor.made_up import groups_of

    (count,) = query(prometheus, 'count({__name__=~"sutrain_.+"})')
    assert int(count["value"][1]) == series_count(groups_of(12))
