from __future__ import annotations

import json
import logging
import math
import resource
import threading

import pytest

from pipeline.tracking.journal import JOURNAL_FILE, Journal, artifacts_record, metric_values, metrics_record

SERVER = "http://server"


def test_records_are_read_in_order_with_their_offsets(tmp_path):
    journal = Journal(tmp_path)
    records = [metrics_record("backbone", {"loss": 0.1 + step}, step, since_ms=5) for step in range(3)]
    for record in records:
        journal.append(record)
    places, read = zip(*journal.read(), strict=True)
    assert list(read) == records
    assert places[-1] == journal.path.stat().st_size
    assert [record for _, record in journal.read(places[0])] == records[1:]


def test_a_journal_that_does_not_exist_is_empty(tmp_path):
    assert list(Journal(tmp_path).read()) == []
    assert Journal(tmp_path).num_pending(SERVER) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1, 1e-300, float("1e30")])
def test_every_float_survives_and_the_line_is_strict_json(tmp_path, value):
    journal = Journal(tmp_path)
    journal.append(metrics_record(None, {"loss": value}, 1, since_ms=0))
    ((_, record),) = journal.read()
    assert str(metric_values(record)["loss"]) == str(value)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads(journal.path.read_text(), parse_constant=refuse)


def test_a_line_that_is_still_being_written_is_not_read(tmp_path):
    journal = Journal(tmp_path)
    journal.append(artifacts_record("report", "report"))
    whole = journal.path.stat().st_size
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "metr')
    assert [place for place, _ in journal.read()] == [whole]


def test_a_truncated_line_loses_no_other_line(tmp_path, caplog):
    journal = Journal(tmp_path)
    first, second = artifacts_record("a", None), artifacts_record("b", None)
    journal.append(first)
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "metr')
    journal.append(second)
    with caplog.at_level(logging.WARNING):
        assert [record for _, record in journal.read()] == [first, second]
    assert "damaged line" in caplog.text


def test_a_record_that_is_written_only_in_part_is_an_error(tmp_path):
    journal, record = Journal(tmp_path), artifacts_record("report", "report")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match="only 10 of"):
            journal.append(record)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append(record)
    assert [found for _, found in journal.read()] == [record]


def test_lines_of_two_writers_do_not_mix(tmp_path):
    def write(writer):
        journal = Journal(tmp_path)
        for step in range(50):
            journal.append(metrics_record(str(writer), {f"key{i}": step for i in range(20)}, step, since_ms=0))

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = [(record["stage"], record["step"]) for _, record in Journal(tmp_path).read()]
    assert sorted(read) == sorted((str(writer), step) for writer in range(2) for step in range(50))


def test_delivery_is_remembered_for_one_server_and_run(tmp_path):
    journal = Journal(tmp_path)
    journal.append(artifacts_record("a", None))
    journal.append(artifacts_record("b", None))
    (first_place, _), _ = journal.read()
    assert journal.num_pending(SERVER) == 2
    journal.set_delivered(SERVER, "run", first_place)
    assert Journal(tmp_path).delivered(SERVER) == first_place
    assert journal.num_pending(SERVER) == 1
    assert journal.num_pending("http://another") == 2
    assert journal.delivered(SERVER, "run") == first_place
    assert journal.delivered(SERVER, "another run") == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"server": "http://server"}'])
def test_a_damaged_offset_sends_everything_again(tmp_path, content):
    journal = Journal(tmp_path)
    journal.append(artifacts_record("a", None))
    (tmp_path / f"{JOURNAL_FILE}.delivered").write_text(content)
    assert journal.delivered(SERVER) == 0


def test_a_journal_shorter_than_its_offset_is_sent_from_the_start(tmp_path):
    journal = Journal(tmp_path)
    journal.append(artifacts_record("a", None))
    journal.set_delivered(SERVER, "run", 10_000)
    assert journal.delivered(SERVER) == 0
