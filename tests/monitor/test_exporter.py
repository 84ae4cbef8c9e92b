"""The endpoint over real HTTP: what it says, that a scrape is consistent, and that it goes away again."""

import itertools
import math
import socket
import threading
import time
import urllib.request

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sutrain.monitor.exporter import MAX_LAYERS, Exporter, chosen_layers, series_count
from sutrain.monitor.ranks import RankBoard, RankState
from sutrain.monitor.series import ALL, PROBE_LAYERED
from sutrain.monitor.spikes import SpikeWatch
from tests.monitor.made_up import COLUMNS, groups_of, made_up_run, probe_of


def scrape(exporter: Exporter) -> dict[tuple, float]:
    """{(name, sorted labels): value}, parsed by prometheus-client's own parser."""
    with urllib.request.urlopen(f"http://{exporter.host}:{exporter.port}/metrics", timeout=10) as reply:
        text = reply.read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def feed(exporter: Exporter, **settings) -> None:
    watch = None
    for record, table, evaluation in made_up_run(**settings):
        watch = watch or SpikeWatch(table.groups)
        exporter.step(record, table, watch.judge(record["loss"], record["learning_rate"], table))
        if evaluation:
            exporter.evaluation(evaluation)


def test_every_series_of_the_contract_is_served_and_no_other():
    with Exporter("127.0.0.1", 0, groups_of(3), {"run": "a", "mfu_reference": "b"}) as exporter:
        before = scrape(exporter)
        feed(exporter, layers=3, steps=60, evaluate_every_steps=20)
        exporter.probe(probe_of(3))
        exporter.board = RankBoard("127.0.0.1", 2)
        exporter.board.take(1, RankState(60, 2, 1.7e9, 0.5, 0.1, 0.2))
        found = scrape(exporter)
        exporter.board.close()
    names = {name for name, *_ in found if name.startswith("sutrain_")}
    assert names == {series.name for series in ALL}
    assert found["sutrain_step",] == 60 and found["sutrain_tokens_total",] == 60 * 16 * 128
    assert found["sutrain_unigram_accuracy",] == 0.062
    assert (
        found["sutrain_model_update",] == 0.01 and found["sutrain_attention_entropy", ("layer", "2")] == 3.0
    )
    assert found["sutrain_rank_progress", ("rank", "1")] == 60.5
    assert found["sutrain_rank_forward_seconds", ("rank", "1")] == 0.2
    assert found["sutrain_validation_loss_by_length", ("length", "32")] > found["sutrain_validation_loss",]
    assert 0 < found["sutrain_disk_free_ratio",] < 1
    assert found["sutrain_run_info", ("mfu_reference", "b"), ("run", "a")] == 1
    # Spike counters are there, at zero, before the first step: else the first increase could not be seen.
    assert before["sutrain_loss_spikes_total",] == 0
    assert before["sutrain_update_spikes_total", ("layer", "2"), ("part", "mixer")] == 0


def test_a_finished_run_waits_for_the_one_who_scrapes_it_and_for_nobody_else():
    """For the next scrape of one that comes every 0.4 s; not for one that has gone, or that came only once."""
    (record, table, _), (later, *_) = itertools.islice(made_up_run(layers=1), 2)
    with Exporter("127.0.0.1", 0, groups_of(1), total_steps=2) as exporter:
        exporter.step(record, table)
        started = time.monotonic()
        scrape(exporter)
        exporter.wait_for_scrape()
        assert time.monotonic() - started < 0.3
        time.sleep(0.4)
        scrape(exporter)
        found = {}
        scraper = threading.Timer(0.4, lambda: found.update(scrape(exporter)))
        scraper.start()
        exporter.step(later, table)
        exporter.wait_for_scrape()
        assert found["sutrain_step",] == found["sutrain_total_steps",] == 2
        started = time.monotonic()
        exporter.wait_for_scrape()
        assert time.monotonic() - started < 1.5
        exporter.wait_for_scrape()
        assert time.monotonic() - started < 1.5, "one that did not come is not waited for again"


def test_who_looks_once_in_ten_minutes_is_not_waited_for(monkeypatch):
    with Exporter("127.0.0.1", 0, groups_of(1)) as exporter:
        for seconds in (1000.0, 1600.0):
            monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: seconds)
            list(exporter.collect())
        monkeypatch.setattr(exporter._scraped, "wait", lambda *_: pytest.fail("waited"))
        exporter.wait_for_scrape()
        monkeypatch.undo()


def test_numbers_are_those_of_the_table():
    groups = groups_of(2)
    record, table, _ = next(made_up_run(layers=2, steps=20))
    with Exporter("127.0.0.1", 0, groups) as exporter:
        exporter.step(record, table)
        found = scrape(exporter)
    row = groups.keys.index(("1", "feed_forward"))
    for column in ("grad_norm", "weight_norm", "update_norm", "update_ratio"):
        value = found[f"sutrain_{column}", ("layer", "1"), ("part", "feed_forward")]
        assert value == getattr(table, column)[row]
    assert found["sutrain_global_update_norm",] == table.global_norms["update_norm"]
    assert found["sutrain_update_depth_slope", ("part", "mixer")] == table.depth_slope("mixer")
    middle = found["sutrain_grad_norm_over_depth", ("part", "mixer"), ("quantile", "0.5")]
    assert middle == pytest.approx(table.over_depth("grad_norm", "mixer")[1])


def test_spikes_and_skips_are_counted():
    with Exporter("127.0.0.1", 0, groups_of(4)) as exporter:
        feed(exporter, layers=4, steps=100, spike_at=(60, 80))
        found = scrape(exporter)
        assert found["sutrain_loss_spikes_total",] == 2
        assert found["sutrain_update_spikes_total", ("layer", "0"), ("part", "mixer")] == 2
        assert found["sutrain_update_spikes_total", ("layer", "3"), ("part", "mixer")] == 0
        record, table, _ = next(made_up_run(layers=4))
        for total, expected in ((1, 1), (2, 2), (2, 0), (3, 1)):
            exporter.step({**record, "skipped_steps_total": total}, table)
            assert scrape(exporter)["sutrain_skipped_steps_in_a_row",] == expected


def test_after_a_resume_counters_begin_at_zero_and_the_position_is_the_runs():
    record, table, _ = next(made_up_run(layers=1))
    before = {
        "skipped_steps_total": 3,
        "refused_steps_total": 31,
        "samples_consumed_total": 512,
        "tokens_total": 9000,
    }
    counters = [f"sutrain_{key}" for key in before]
    with Exporter("127.0.0.1", 0, groups_of(1), started_at_step=5, totals_before=before) as exporter:
        found = scrape(exporter)
        assert [found[name,] for name in counters] == [0, 0, 0, 0]
        for skipped, in_a_row in ((0, 0), (1, 1)):
            step = {key: total + 10 for key, total in before.items()}
            exporter.step({**record, **step, "skipped_steps_total": 3 + skipped}, table)
            found = scrape(exporter)
            assert [found[name,] for name in counters] == [skipped, 10, 10, 10]
            assert found["sutrain_skipped_steps_in_a_row",] == in_a_row
    assert found["sutrain_run_samples_consumed",] == 522 and found["sutrain_run_tokens",] == 9010


@pytest.mark.parametrize(("layers", "cap"), [(5, 8), (8, 8), (200, 8), (30, 1), (1000, MAX_LAYERS)])
def test_the_number_of_series_is_bounded_and_known_beforehand(layers, cap):
    groups = groups_of(layers)
    with Exporter("127.0.0.1", 0, groups, max_layers=cap) as exporter:
        feed(exporter, layers=layers, steps=30, evaluate_every_steps=40)
        exporter.evaluation(
            {"step": 30, "validation_loss": 1, "validation_accuracy": 1, "unigram_accuracy": 0}
        )
        exporter.probe(probe_of(layers))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            with urllib.request.urlopen(
                f"http://{exporter.host}:{exporter.port}/metrics", timeout=10
            ) as reply:
                reply.read()
            seconds.append(time.perf_counter() - began)
        ours = [key for key in scrape(exporter) if key[0].startswith("sutrain_")]
    assert len(ours) == series_count(groups, cap, optimizer_columns=3, probed=len(PROBE_LAYERED))
    assert min(seconds) < 0.1
    # An optimizer has its trust ratio or its clip, never both.
    assert series_count(groups, cap, optimizer_columns=2, probed=len(PROBE_LAYERED)) < 2000
    assert (
        len({dict(key[1:])["layer"] for key in ours if key[0] == "sutrain_grad_norm"}) == min(layers, cap) + 1
    )


def test_spikes_of_layers_without_their_own_series_are_not_lost():
    groups = groups_of(40)
    watch = SpikeWatch(groups)
    with Exporter("127.0.0.1", 0, groups, max_layers=4) as exporter:
        sums = np.ones((len(groups.names), 4))
        for step in range(1, 31):
            if step == 30:
                sums[[name.startswith("encoder.layers.7.") for name in groups.names], 2] = 100
            table = groups.table(sums, COLUMNS)
            exporter.step({"step": step, "loss": 1.0}, table, watch.judge(1.0, 1e-3, table))
        found = scrape(exporter)
    assert chosen_layers(40, 4) == {0, 13, 26, 39}
    assert found["sutrain_update_spikes_total", ("layer", "other"), ("part", "mixer")] == 1
    assert sum(value for key, value in found.items() if key[0] == "sutrain_update_spikes_total") == 3


def test_a_loss_that_is_not_a_number_is_shown_and_a_norm_that_was_not_measured_is_left_out():
    groups = groups_of(2)
    sums = np.ones((len(groups.names), 4))
    sums[:, 1] = np.nan
    with Exporter("127.0.0.1", 0, groups) as exporter:
        exporter.step({"step": 1, "loss": math.nan}, groups.table(sums, COLUMNS))
        found = scrape(exporter)
    assert math.isnan(found["sutrain_loss",])
    assert not [key for key in found if key[0] == "sutrain_grad_norm"]
    assert found["sutrain_update_norm", ("layer", "0"), ("part", "norm")] == pytest.approx(math.sqrt(2))


def test_a_scrape_shows_one_step_whole_while_steps_go_by():
    groups = groups_of(6)
    stop = threading.Event()

    def train(exporter: Exporter) -> None:
        step = 0
        while not stop.is_set():
            step += 1
            sums = np.full((len(groups.names), 4), float(step) ** 2)
            exporter.step({"step": step, "loss": step, "tokens_total": step}, groups.table(sums, COLUMNS))

    with Exporter("127.0.0.1", 0, groups) as exporter:
        thread = threading.Thread(target=train, args=(exporter,))
        thread.start()
        seen = set()
        try:
            while exporter._snapshot.table is None:
                time.sleep(0.001)
            for _ in range(30):
                found = scrape(exporter)
                step = found["sutrain_step",]
                head = found["sutrain_grad_norm", ("layer", ""), ("part", "head")]
                assert found["sutrain_loss",] == found["sutrain_tokens_total",] == step == head
                seen.add(step)
        finally:
            stop.set()
            thread.join()
    assert len(seen) > 5


def test_close_frees_the_port_and_a_port_in_use_is_one_clear_line():
    groups = groups_of(1)
    first = Exporter("127.0.0.1", 0, groups).start()
    with pytest.raises(ValueError, match=rf"monitor\.port: {first.port} on 127\.0\.0\.1 is in use"):
        Exporter("127.0.0.1", first.port, groups).start()
    first.close()
    first.close()
    with Exporter("127.0.0.1", first.port, groups) as again:
        assert scrape(again)
    with pytest.raises(ValueError, match=r"monitor\.port: 70000 is not a port"):
        Exporter("127.0.0.1", 70000, groups).start()
    with pytest.raises(ValueError, match=r"monitor\.host: cannot listen on '192\.0\.2\.1'"):
        Exporter("192.0.2.1", 0, groups).start()


def test_it_listens_on_the_given_address_only():
    with Exporter("127.0.0.1", 0, groups_of(1)) as exporter:
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", exporter.port), timeout=2)


def test_the_heartbeat_moves_with_every_sign_of_life():
    record, table, _ = next(made_up_run(layers=1))
    with Exporter("127.0.0.1", 0, groups_of(1)) as exporter:
        beats = [scrape(exporter)["sutrain_heartbeat_timestamp_seconds",]]
        for sign in (
            lambda: exporter.step(record, table),
            lambda: exporter.evaluation({"step": 1, "validation_loss": 1.0}),
            exporter.heartbeat,
        ):
            time.sleep(0.01)
            sign()
            beats.append(scrape(exporter)["sutrain_heartbeat_timestamp_seconds",])
    assert beats == sorted(set(beats))
    assert abs(beats[-1] - time.time()) < 5
