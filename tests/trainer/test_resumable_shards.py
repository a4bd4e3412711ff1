"""Shards: nothing is lost or doubled, whatever happens to the process."""

import multiprocessing
import random
import threading
import time

import pytest
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from dparallel.trainer.resumable_shards import map_in_shards

ITEMS = list(range(53))


def squares(number, items, pause=0.0):
    time.sleep(pause)
    return [{"shard": number, "square": item**2, "note": None if number == 0 else "x"} for item in items]


def test_rows_come_in_order_and_are_not_computed_again(tmp_path):
    calls = []

    def compute(number, items):
        calls.append(number)
        return squares(number, items)

    rows = map_in_shards(compute, ITEMS, tmp_path, {"a": 1}, shard_size=10)
    assert rows["square"][:] == [item**2 for item in ITEMS] and calls == [0, 1, 2, 3, 4, 5]
    assert rows["note"][:] == [None] * 10 + ["x"] * 43
    (tmp_path / "shard-00003.arrow").unlink()
    (tmp_path / "shard-00004.99.tmp").write_bytes(b"of a killed run")
    again = map_in_shards(compute, ITEMS, tmp_path, {"a": 1}, shard_size=10)
    assert again.to_list() == rows.to_list() and calls == [0, 1, 2, 3, 4, 5, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_items_of_a_dataset_and_several_rows_for_each(tmp_path):
    dataset = Dataset.from_dict({"x": ITEMS})
    rows = map_in_shards(
        lambda number, part: [{"y": row["x"]} for row in part for _ in range(2)], dataset, tmp_path, {}, shard_size=7
    )
    assert rows["y"][:] == [x for x in ITEMS for _ in range(2)]


@pytest.mark.parametrize(
    ("items", "settings", "shard_size", "message"),
    [
        (ITEMS, {"a": 2, "b": [1]}, 10, "`a` was 1, is 2"),
        (ITEMS, {"a": 1, "b": [1], "c": 0}, 10, "`c` was None, is 0"),
        (ITEMS[:-1], {"a": 1, "b": [1]}, 10, "`num_items` was 53, is 52"),
        (ITEMS, {"a": 1, "b": [1]}, 11, "`shard_size` was 10, is 11"),
    ],
)
def test_another_job_is_noticed(tmp_path, items, settings, shard_size, message):
    map_in_shards(squares, ITEMS, tmp_path, {"a": 1, "b": (1,)}, shard_size=10)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        map_in_shards(squares, items, tmp_path, settings, shard_size=shard_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_shards_without_settings(tmp_path):
    (tmp_path / "shard-00000.arrow").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no settings.json"):
        map_in_shards(squares, ITEMS, tmp_path, {})
    with pytest.raises(ValueError, match="`shard_size=0` is not allowed"):
        map_in_shards(squares, ITEMS, tmp_path, {}, shard_size=0)


def slow_job(folder):
    tqdm.set_lock(threading.RLock())  # not the one shared with the parent, which a kill could leave locked for ever
    map_in_shards(lambda number, items: squares(number, items, pause=0.01), ITEMS, folder, {}, shard_size=2)


def test_killed_twenty_times(tmp_path):
    """At random moments, by the signal that cannot be caught."""
    PartialState()  # before forking, so that a child lives long enough to be killed at work
    context, kills, attempts = multiprocessing.get_context("fork"), 0, random.Random(0)
    while kills < 20 or not list((tmp_path / "killed").glob("shard-*.arrow")):
        process = context.Process(target=slow_job, args=(tmp_path / "killed",))
        process.start()
        time.sleep(attempts.uniform(0.0, 0.06) * max(1, kills / 20))  # longer where the machine is busy
        process.kill()
        process.join()
        kills += 1
    expected = map_in_shards(squares, ITEMS, tmp_path / "unbroken", {}, shard_size=2)
    assert map_in_shards(squares, ITEMS, tmp_path / "killed", {}, shard_size=2).to_list() == expected.to_list()
