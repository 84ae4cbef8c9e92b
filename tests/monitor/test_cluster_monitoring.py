"""cluster/monitoring against a real Prometheus that scrapes real training on two ranks."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from sutrain.monitor.exporter import series_count
from sutrain.monitor.series import ALL, PROBE_LAYERED
from sutrain.monitor.textfile import server_of
from tests import warm
from tests.conftest import RUN
from tests.monitor.made_up import groups_of

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
DASHBOARDS = sorted((MONITORING / "grafana" / "dashboards").glob("*.json"))
needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed (Debian package prometheus)",
)
needs_grafana_sdk = pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None,
    reason="grafana-foundation-sdk is not installed",
)


def panels() -> list[dict]:
    pages = [json.loads(path.read_text()) for path in DASHBOARDS]
    return [panel for page in pages for panel in page["panels"] if panel["type"] != "row"]


def rules() -> list[dict]:
    files = sorted((MONITORING / "rules").glob("*.yml"))
    groups = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """Every expression that people will see the answer of, by where it stands, variables filled in."""
    found = {
        f"panel {panel['id']} {panel['title']} {target['refId']}: {target['expr']}": target["expr"]
        for panel in panels()
        for target in panel["targets"]
    }
    found |= {f"rule {rule['record']}": rule["expr"] for rule in rules() if "record" in rule}
    return {
        where: text.replace("$instance", ".+").replace("$part", "mixer").replace("$__rate_interval", "1m")
        for where, text in found.items()
    }


def alert_expressions() -> dict[str, str]:
    """The expressions of the alerts by name, with comparisons that answer 0 or 1 instead of hiding what is false."""
    compare = re.compile(r" (>=|<=|==|!=|>|<) ")
    found = {}
    for rule in rules():
        if "alert" in rule:
            asked, *unless = rule["expr"].replace('{stage="finished"}', '{stage="no such"}').split("unless")
            found[rule["alert"]] = "unless".join([compare.sub(r" \1 bool ", asked), *unless])
    return found


@needs_grafana_sdk
def test_the_dashboard_is_what_its_script_makes():
    path = MONITORING / "grafana" / "make_dashboards.py"
    spec = importlib.util.spec_from_file_location("make_dashboards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = module.texts()
    assert {path.name for path in DASHBOARDS} == set(texts) and len(texts) == 5
    for path_ in DASHBOARDS:
        assert path_.read_text() == texts[path_.name], f"run python {path.relative_to(ROOT)}"


def test_every_panel_says_what_it_shows_and_in_what_unit():
    found = panels()
    assert len(found) >= 60
    for path in DASHBOARDS:
        numbers = [panel["id"] for panel in json.loads(path.read_text())["panels"]]
        assert len(set(numbers)) == len(numbers), path
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
def test_the_kubernetes_configuration_is_one_apart_from_its_discovery(tmp_path):
    """Debian's promtool is built without Kubernetes; it checks the rest, and the discovery is looked at here."""
    config = yaml.safe_load((MONITORING / "prometheus-kubernetes.yml").read_text())
    config["rule_files"] = [str(MONITORING / "rules" / "*.yml")]
    for scrape in config["scrape_configs"]:
        (discovery,) = scrape.pop("kubernetes_sd_configs")
        assert set(discovery) == {"role", "selectors"} and discovery["role"] == "pod"
        assert all(set(selector) == {"role", "label"} for selector in discovery["selectors"])
        used = {name for rule in scrape["relabel_configs"] for name in rule["source_labels"]}
        assert used <= {
            "__meta_kubernetes_namespace", "__meta_kubernetes_pod_name", "__meta_kubernetes_pod_ip",
            "__meta_kubernetes_pod_phase", "__meta_kubernetes_pod_annotation_prometheus_io_port",
        }  # fmt: skip
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = ["promtool", "check", "config", tmp_path / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [scrape["job_name"] for scrape in config["scrape_configs"]]
    assert jobs == [
        c["job_name"] for c in yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    ]


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


MADE_UP_LAYERS = 12
EVERYTHING_IS_THERE = (
    'count(ALERTS{alertname=~"SutrainUpdateSpike|SutrainLossSpike"} == 1) >= 2',
    'count(sutrain_trust_ratio) and count(sutrain_direction_rms) and count(sutrain_rank_progress{rank="1"})',
    'count(sutrain_validation_loss_by_source{source="made"}) >= 2 and count(sutrain_logit_rms) >= 3',
    "count(rate(data_prep_records_total[1m]))",
    "sutrain:update_depth_slope:median10m and on (instance) sutrain:tokens_per_second:median30m",
)


@pytest.fixture(scope="module")
def targets(dataset, tmp_path_factory):
    """{job: addresses} of a run on two ranks with AdaFactor, another with LAMB, both real, a made-up run that spikes,
    and the preparation of the data."""
    folder = tmp_path_factory.mktemp("runs")
    started, logs, ports = [], [], []
    for name, ranks in (("adafactor", 2), ("lamb", 1)):
        ports.append(free_port())
        tree = {
            **RUN,
            "run_dir": str(folder / name),
            "steps": 100_000,
            "data": {"dir": str(dataset)},
            "optimizer": {"name": name, "learning_rate": 0.01},
            "evaluation": {"every_steps": 20, "sequences": 8},
            "checkpoint": {"every_steps": 50},
            "monitor": {"port": ports[-1], "probe_every_steps": 10},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
        logs.append((folder / f"{name}.log").open("w+"))
        program = ("sutrain/pretrain.py", "--config", folder / f"{name}.yaml")
        started.append(warm.start(*program, ranks=ranks, stdout=logs[-1], start_new_session=True))
    command = [sys.executable, "-m", "tests.monitor.serve", str(MADE_UP_LAYERS)]
    started.append(
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    )
    command = [sys.executable, "-m", "sutrain.monitor.textfile", str(dataset / "metrics.prom"), "--port", "0"]
    started.append(
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    )
    try:
        made_up = f"127.0.0.1:{started[2].stdout.readline().strip()}"
        data = urllib.parse.urlsplit(started[3].stdout.readline().strip()).netloc
        yield {
            "sutrain": [*(f"127.0.0.1:{port}" for port in ports), made_up],
            "data_prep": [data],
            "logs": logs,
            "started": started,
        }
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
        for log in logs:
            log.close()


@pytest.fixture(scope="module")
def prometheus(targets, tmp_path_factory):
    """Address of a Prometheus with the repository's configuration, only faster, once it has seen everything."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(MONITORING / "rules" / "*.yml")]
    for scrape in config["scrape_configs"]:
        scrape["static_configs"][0]["targets"] = targets[scrape["job_name"]]
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
        deadline = time.monotonic() + 150
        waiting = list(EVERYTHING_IS_THERE)
        while waiting:
            with contextlib.suppress(OSError):
                waiting = [expression for expression in waiting if not query(address, expression)]
            if time.monotonic() > deadline or any(
                p.poll() is not None for p in (server, *targets["started"])
            ):
                for file in targets["logs"]:
                    file.seek(0)
                said = "\n".join(file.read()[-3000:] for file in targets["logs"])
                pytest.fail(f"still waiting for {waiting}\n{(folder / 'log').read_text()}\n{said}")
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=20)


def query(address: str, expression: str) -> list[dict]:
    parameters = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{parameters}", timeout=10) as reply:
        return json.load(reply)["data"]["result"]


@needs_prometheus
def test_every_expression_returns_data(prometheus, targets):
    for where, expression in {**expressions(), **alert_expressions()}.items():
        try:
            result = query(prometheus, expression)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{where}: {expression}: {error.read().decode()}")
        assert result, f"{where}: {expression} returns nothing"
        assert all(math.isfinite(float(sample["value"][1])) for sample in result), where
    panel = next(e for w, e in expressions().items() if " Update ÷ weight by layer" in w)
    layers = query(prometheus, panel)
    assert {sample["metric"]["layer"] for sample in layers} == {f"{i:04d}" for i in range(MADE_UP_LAYERS)}
    ranks = query(prometheus, f'sutrain_rank_step_seconds{{instance="{targets["sutrain"][0]}"}}')
    assert {sample["metric"]["rank"] for sample in ranks} == {"0", "1"}


@needs_prometheus
def test_the_alarms_of_a_spiking_run_fire_and_no_others(prometheus, targets):
    firing = query(prometheus, 'ALERTS{alertstate="firing"}')
    made_up = targets["sutrain"][2]
    assert {(s["metric"]["alertname"], s["metric"]["instance"]) for s in firing} == {
        ("SutrainUpdateSpike", made_up), ("SutrainLossSpike", made_up),
    }  # fmt: skip


@needs_prometheus
def test_the_number_of_series_is_what_the_exporter_promises(prometheus, targets):
    (count,) = query(prometheus, f'count({{__name__=~"sutrain_.+", instance="{targets["sutrain"][2]}"}})')
    expected = series_count(groups_of(MADE_UP_LAYERS), optimizer_columns=3, probed=len(PROBE_LAYERED))
    assert int(count["value"][1]) == expected + 6  # evaluation: two lengths and a source, loss and accuracy


def test_the_file_server_serves_one_file_and_says_when_it_is_gone(tmp_path):
    (tmp_path / "metrics.prom").write_text("data_prep_records_total 1\n")
    (tmp_path / "secret").write_text("no")
    with server_of(tmp_path / "metrics.prom", "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{address}/metrics", timeout=10) as reply:
            assert reply.read() == b"data_prep_records_total 1\n"
            assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        for path in ("/secret", "/../secret", "/"):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(address + path, timeout=10)
        (tmp_path / "metrics.prom").unlink()
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{address}/metrics", timeout=10)
        server.shutdown()
