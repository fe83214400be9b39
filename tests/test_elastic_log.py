"""The log of an elastic run and its leases: what enters, what is found again, what is refused."""

import errno
import os
import re

import numpy as np
import pytest

from experiments.elastic.checkpoints import Checkpoints
from experiments.elastic.leases import Answer, Lease, Round
from experiments.elastic.log import Log, Record
from experiments.elastic.worker import Start


def record(step, losses=((0.1, 0.2), (np.nan, 1e-30)), **more):
    array = np.array(losses, np.float32)
    return Record(step, (1, 2), (0, len(array)), (0, 4), array, **more)


def same(one, other):
    return all(
        a == b if not isinstance(a, np.ndarray) else a.tobytes() == b.tobytes()
        for a, b in zip(one, other, strict=True)
    )


@pytest.fixture(params=["file", "memory"])
def address(request, tmp_path):
    return str(tmp_path / "run" / "log") if request.param == "file" else f"memory:/{tmp_path}/log"


def written(address, count=3):
    log = Log(address)
    assert log.read() == ({}, [])
    log.begin({"bits": 4})
    records = [record(i, look=np.float32([i, 0.1]), hash="ab" * (i == 2)) for i in range(count)]
    for one in records:
        log.append(one)
    log.close()
    return records


def test_steps_are_found_again_bit_for_bit(address):
    records = written(address)
    begins, found = Log(address).read()
    assert begins == {"bits": 4}
    assert len(found) == 3 and all(map(same, records, found))
    assert found[2].hash == "ab" and record(0).look is None


def test_a_log_goes_on_where_it_stopped(address):
    written(address)
    log = Log(address)
    log.read()
    log.append(record(3))
    assert [x.step for x in Log(address).read()[1]] == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [1, 5, 60, 99])
def test_a_torn_last_line_is_dropped_and_written_again(lost, tmp_path):
    path = tmp_path / "log"
    written(str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    log = Log(str(path))
    assert [x.step for x in log.read()[1]] == [0, 1]
    log.append(record(2, look=np.float32([2, 0.1]), hash="ab"))
    assert path.read_bytes() == whole


def test_a_torn_first_line_is_no_run(tmp_path):
    path = tmp_path / "log"
    written(str(path), 0)
    path.write_bytes(path.read_bytes()[:-4])
    assert Log(str(path)).read() == ({}, [])
    assert path.read_bytes() == b""


def test_other_damage_is_told(tmp_path):
    path = tmp_path / "log"
    written(str(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"0.1", b"0.3"), lines[3]]))
    with pytest.raises(ValueError, match=r"log: line 3 of .* is damaged: its checksum"):
        Log(str(path)).read()
    path.write_bytes(b"".join([lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="steps are missing"):
        Log(str(path)).read()
    path.write_text("# Notes\nof mine\n")
    with pytest.raises(ValueError, match=r"log: line 1 of .* is damaged"):
        Log(str(path)).read()
    assert path.read_text() == "# Notes\nof mine\n"


def test_a_line_that_finds_no_room_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "log"
    written(str(path), 1)
    log, before = Log(str(path)), path.read_bytes()
    log.read()

    def full(file, content):
        write(file, content[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            log.append(record(1))
    assert path.read_bytes() == before
    log.append(record(1))
    assert len(Log(str(path)).read()[1]) == 2


def test_an_address_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match="log: nowhere://x is no address that fsspec knows"):
        Log("nowhere://x")


def test_the_newest_checkpoint_that_can_be_read(tmp_path):
    some = Checkpoints(str(tmp_path / "log"))
    for step in (5, 10, 15):
        some.write(Start(step, [np.full(1000, step), np.zeros(0)]))
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "log.checkpoint-000000010", "log.checkpoint-000000015"
    ]  # fmt: skip
    assert some.newest(20).step == 15 and some.newest(14).step == 10 and some.newest(9) is None
    newest = tmp_path / "log.checkpoint-000000015"
    newest.write_bytes(newest.read_bytes()[:-30])
    found = some.newest(20)
    assert found.step == 10 and found.arrays[0].tolist() == [10] * 1000


# Leases


def losses(*values):
    return np.array(values, np.float32).reshape(-1, 1, 2)


def a_round(pieces=2, seconds=10.0):
    return Round(3, "losses", pieces, (1, 2), seconds)


def test_pieces_are_divided_into_shares_and_each_is_given_once():
    one = a_round(5)
    found = [one.lease(name, 3 - i, 0.0) for i, name in enumerate("abc")]
    assert [(x.first, x.last) for x in found] == [(0, 2), (2, 4), (4, 5)]
    assert one.lease("d", 1, 0.0) is None
    one.forget("b")
    assert one.lease("d", 1, 0.0) == found[1]


def test_a_lease_that_is_not_answered_in_time_goes_to_another_and_both_may_answer():
    one = a_round()
    first = one.lease("a", 1, 0.0)
    assert one.until(4.0) == 6.0
    assert one.lease("b", 1, 9.9) is None and one.lease("a", 1, 11.0) is None
    assert one.lease("b", 1, 11.0) == first and one.lease("c", 1, 12.0) is None
    assert one.enter("a", Answer(first, losses(1, 2, 3, 4))) == {}
    assert one.is_complete
    assert one.enter("b", Answer(first, losses(1, 2, 3, 4))) == {} and one.wasted == 2


def test_late_answers_never_enter():
    one = a_round()
    one.lease("a", 1, 0.0)
    for late in (Lease(2, "losses", 0, 2), Lease(4, "losses", 0, 2), Lease(3, "look", 0, 2)):
        assert one.enter("a", Answer(late, losses(1, 2, 3, 4))) == {}
    assert one.enter("a", Answer(None)) == {}
    assert not one.found.any() and not one.is_complete


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (losses(1, 2), r"shape \(1, 1, 2\) instead of shape \(2, 1, 2\)"),
        (losses(1, 2, 3, 4).astype(np.float64), "float64 instead of float32"),
        ([1.0, 2.0], "its answer has list instead"),
        (None, "NoneType"),
    ],
)
def test_answers_that_are_none_never_enter(found, why):
    one = a_round()
    lease = one.lease("a", 1, 0.0)
    assert re.search(why, one.enter("a", Answer(lease, found))["a"])
    assert not one.found.any()
    assert one.lease("b", 1, 0.0) == lease  # at once


def test_answers_out_of_range_or_not_asked_never_enter():
    one = a_round()
    one.lease("a", 2, 0.0)
    far, other = Lease(3, "losses", 1, 3), Lease(3, "losses", 1, 2)
    assert "out of range" in one.enter("a", Answer(far, losses(1, 2, 3, 4)))["a"]
    assert "was not asked" in one.enter("a", Answer(other, losses(1, 2)))["a"]
    assert not one.found.any()


def test_a_loss_that_is_not_finite_is_asked_of_another():
    one = a_round()
    lease = one.lease("a", 1, 0.0)
    assert one.enter("a", Answer(lease, losses(1, 2, np.inf, 4))) == {}
    assert one.lease("a", 1, 1.0) is None
    second = one.lease("b", 1, 1.0)
    assert (second.first, second.last) == (1, 2)
    assert one.enter("b", Answer(second, losses(np.nan, 4))) == {}
    assert one.is_complete and one.found.ravel().tolist()[:2] == [1, 2]
    assert np.isnan(one.found[1, 0, 0]) and one.found[1, 0, 1] == 4


def test_who_alone_finds_no_finite_number_is_wrong():
    one = a_round(1)
    one.enter("a", Answer(one.lease("a", 1, 0.0), losses(np.nan, 2)))
    wrong = one.enter("b", Answer(one.lease("b", 1, 0.0), losses(1, 2)))
    assert wrong == {"a": "it found nan and 2 where b found 1 and 2"}
    assert one.found.ravel().tolist() == [1, 2]


def test_a_worker_alone_is_asked_twice():
    one = a_round(1)
    for _ in range(2):
        assert not one.is_complete
        one.enter("a", Answer(one.lease("a", 1, 0.0, alone=True), losses(np.nan, 2)))
    assert one.is_complete


def test_a_worker_does_not_confirm_itself_where_its_lease_was_long():
    """Another has the same pieces, and is late: the first gets its lease."""
    one = a_round(1)
    lease = one.lease("b", 1, 0.0)
    assert one.lease("a", 1, 11.0) == lease
    assert one.enter("a", Answer(lease, losses(np.nan, 2))) == {}
    assert one.lease("a", 1, 99.0) == lease
    assert one.enter("a", Answer(lease, losses(np.nan, 2))) == {}
    assert not one.is_complete and one.doubts == "a found nan and 2"
    assert list(one.enter("b", Answer(lease, losses(1, 2)))) == ["a"]
