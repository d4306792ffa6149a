"""Preparations as tasks of a real Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import pytest

from datasets.parallel import CHUNKS_AHEAD
from datasets.prepare.prepare import prepare
from jobs.prepare import main
from pipeline.cluster.connection import map_on_cluster
from tests.unit.pictures import jpeg, write_class_folders

pytestmark = [pytest.mark.distributed, pytest.mark.usefixtures("ray_cluster")]

NUM_CPUS = 4  # of the session's cluster


def dying(times: int) -> Callable[[Path, int], int]:
    """Return a function that doubles numbers, but kills its process at 3 the first `times` times.

    It is defined here so that Ray sends it by value.
    """

    def double(folder: Path, number: int) -> int:
        deaths = len(list(folder.iterdir()))
        if number == 3 and deaths < times:
            (folder / str(deaths)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number

    return double


def test_a_lost_task_is_retried_in_order(tmp_path: Path) -> None:
    assert list(map_on_cluster(partial(dying(1), tmp_path), range(20))) == list(range(0, 40, 2))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_task_that_is_lost_repeatedly_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="A Ray task failed, and so did every retry"):
        list(map_on_cluster(partial(dying(100), tmp_path), range(5)))


def test_few_chunks_are_in_flight() -> None:
    taken = []

    def work() -> Iterator[int]:
        for number in count():
            taken.append(number)
            yield number

    results = map_on_cluster(lambda number: -number, work())
    assert list(islice(results, 5)) == [0, -1, -2, -3, -4]
    assert len(taken) <= 5 + CHUNKS_AHEAD * NUM_CPUS
    results.close()


def test_the_cluster_and_processes_prepare_the_same_files(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_class_folders(tmp_path / "source", {"a": 100, "b": 100})
    (source / "a" / "large.jpg").write_bytes(jpeg(300, 200))
    (source / "b" / "bad.jpg").write_bytes(b"no image")
    options = {"max_side": 60, "on_bad_image": "skip"}
    prepare("imagefolder", tmp_path / "local", source=source, num_processes=1, **options)
    config = tmp_path / "config.yaml"
    data = {"dataset": "imagefolder", "source": "source", "folder": "out", **options}
    config.write_text(json.dumps({"name": "test", "data": data, "stages": {"backbone": {"epochs": 1}}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    monkeypatch.setattr("datasets.prepare.prepare.map_ordered", lambda *_, **__: pytest.fail("converted by processes"))
    monkeypatch.setattr(sys, "argv", ["prepare", "--config", str(config)])
    main()
    assert "202 images in" in capsys.readouterr().out
    for local in (path for path in (tmp_path / "local").iterdir() if path.is_file()):
        assert (tmp_path / "out" / local.name).read_bytes() == local.read_bytes(), local.name
