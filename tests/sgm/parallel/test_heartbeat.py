"""A lost rank: the other one names it and exits with 1, without a launcher. Real processes, see failing_ranks.py."""

import json
import re
from datetime import timedelta

import pytest

from sgm.parallel import heartbeat
from tests.processes import run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("failing") / "results.json"
    done = run("tests/sgm/parallel/failing_ranks.py", [str(path)])
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("case", "lost", "reason"),
    [
        ("killed", 1, "is gone: no heartbeat for"),
        ("killed, then SIGTERM", 1, "is gone: no heartbeat for"),
        ("killed while the other is in a collective", 1, "is gone: no heartbeat for"),
        ("killed while the other waits in the store", 1, "is gone: no heartbeat for"),
        ("stopped with the store", 0, "does not answer"),
        ("stopped without the store", 1, "is gone: no heartbeat for"),
        ("failed", 1, "failed: ZeroDivisionError: division by zero"),
        ("stuck", 1, "is stuck: it did not come to the collective"),
    ],
)
def test_a_rank_names_the_lost_one_and_ends(results, case, lost, reason):
    result = results[case]
    message = result["messages"][1 - lost]
    assert f"error: rank {lost} (process {result['pids'][lost]} on " in message.replace("\nrank", "\nerror: rank")
    assert reason in message and "start the same command again" in message
    assert result["codes"][1 - lost] == 1
    assert case == "stuck" or "timed out" not in message.lower(), "found by heartbeats, not by the timeout"


def test_the_rank_that_failed_says_why_and_blames_nobody(results):
    assert results["failed"]["codes"] == [1, 1]
    assert "error: division by zero" in results["failed"]["messages"][1]
    assert "rank 0" not in results["failed"]["messages"][1]


def test_the_phase_of_a_stuck_rank_is_named(results):
    assert re.search(r"rank 1 \(.*\), \d+ s in data of iteration 3, is stuck", results["stuck"]["messages"][0])


def test_a_stuck_rank_ends_too(results):
    assert results["stuck"]["codes"] == [1, 1]
    # On a busy machine rank 0 may have ended before rank 1 looks.
    assert re.search(r"error: (rank 1 |rank 0.* is gone)", results["stuck"]["messages"][1])


@pytest.mark.parametrize("case", ["apart", "paused"])
def test_ranks_that_end_apart_or_pause_raise_no_alarm(results, case):
    assert (results[case]["codes"], results[case]["messages"]) == ([0, 0], ["", ""])


@pytest.mark.parametrize("case", ["slow", "late"])
def test_a_rank_may_work_longer_than_the_timeout_of_collectives(results, case):
    assert (results[case]["codes"], results[case]["messages"]) == ([0, 0], ["", ""])


def test_ranks_that_found_different_things_end_with_a_message(results):
    """Each by itself, before training; shown with the resume point and captions."""
    assert results["different"]["codes"] == [1, 1]
    for message in results["different"]["messages"]:
        assert "error: the ranks do not agree" in message
        assert "rank 1 has the resume point run after iteration 1, and rank 0 has run after iteration 0" in message
        assert "rank 1 has their captions 1, and rank 0 has 0" in message
        assert "groups" not in message and "the clips" not in message and "start all of them with the same" in message


def test_ranks_that_would_encode_different_clips_end_with_a_message(results):
    assert results["different clips"]["codes"] == [1, 1]
    for message in results["different clips"]["messages"]:
        assert "error: ranks would encode other data than rank 0; let all machines see the same files" in message
        assert "Compared with rank 0,\nrank 1:\n  gone: data/b.mp4, 6 bytes" in message


class Store:
    """The store of a run in which all ranks send heartbeats, counting the keys that are read."""

    def __init__(self, *_, **__):
        self.values, self.num_read = {}, 0

    def set(self, key, value):
        self.values[key] = value.encode()

    def multi_get(self, keys):
        self.num_read += len(keys)
        return [self.values.get(key, f"works 7 machine 1 3 data {key}.0".encode()) for key in keys]

    def check(self, keys):
        return False


@pytest.mark.parametrize("rank", [0, 5, 40])
def test_a_rank_reads_as_much_of_64_ranks_as_of_a_thousand(monkeypatch, rank):
    for name, value in {"MASTER_ADDR": "here", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(heartbeat, "PrefixStore", lambda _, store: store)
    monkeypatch.setattr(heartbeat, "TCPStore", Store)
    monkeypatch.setattr(heartbeat.threading.Thread, "start", lambda _: None)
    monkeypatch.setattr(heartbeat.atexit, "register", lambda _: None)
    read = {}
    for size in (64, 1024):
        peers = heartbeat.Peers(rank=rank, size=size, timeout=timedelta(minutes=30))
        peers._closed.wait = lambda seconds: True
        peers._state, peers._holds_store = heartbeat._DONE, False  # one more exchange
        peers._exchange()
        read[size] = peers._store.num_read
        assert {0, (rank + 1) % size, (rank - 1) % size} <= set(peers._watched)
        assert [each.name.split()[1] for each in peers.progress()] == [
            str(other) for other in range(size) if other != rank
        ]
        assert peers._store.num_read == read[size] + size, "all are read where all are asked for"
        if peers._handles_sigterm:
            heartbeat.signal.signal(heartbeat.signal.SIGTERM, heartbeat.signal.SIG_DFL)
    assert read[64] == read[1024] <= 20


def test_every_rank_is_watched_by_others():
    for size in (2, 3, 9, 10, 1024):
        watched = [rank for other in range(size) for rank in heartbeat.watched_by(other, size)]
        assert all(watched.count(rank) >= min(size, 9) for rank in (0, 1, size // 2, size - 1))
