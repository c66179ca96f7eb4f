import json

import numpy as np
import pytest

import metrics
import tracking
from training import Records

RANDOM = np.random.default_rng(0)


def pictures(n):
    return RANDOM.integers(0, 256, (n, 3, 5, 2), dtype=np.uint8)


def test_distance_is_the_root_mean_squared_difference():
    a, b = pictures(4), pictures(7)
    by_hand = [[np.sqrt(np.mean((x.astype(float) - y) ** 2)) for y in b] for x in a]
    np.testing.assert_allclose(metrics.distances(a, b), by_hand, rtol=1e-9)
    np.testing.assert_allclose(np.diag(metrics.distances(a, a)), 0, atol=1e-4)


def test_rank_counts_the_nearer_ones_and_ties():
    distance = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 9.0]])
    np.testing.assert_array_equal(metrics.ranks(distance, np.array([0, 0])), [2, 1])
    np.testing.assert_array_equal(metrics.ranks(distance, np.array([1, 2])), [0, 2])


def test_accuracy_is_whole_for_copies_and_chance_for_shuffled_ones():
    drawn = pictures(500)
    distance = metrics.distances(drawn, drawn)
    own = np.arange(500)
    assert metrics.top(metrics.ranks(distance, own), 1) == 1
    shuffled = metrics.ranks(distance, RANDOM.permutation(500))
    assert metrics.top(shuffled, 1) < 0.02
    assert abs(metrics.top(shuffled, 250) - 0.5) < 0.1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_by_hand(k):
    assert metrics.top(np.array([0, 1, 2, 2]), k) == [0.25, 0.5, 1][k - 1]


def test_a_resumed_log_drops_what_came_after_its_checkpoint_and_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"st}')
    log = tracking.MetricsLog(path, 4, pictures=10, B=3)
    with log.paused():
        pass
    log.write(6, Records(np.array([3.0, 0.0]), np.array([6.0, 0.0]), np.float32(1), np.int32(0)))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    last = lines[-1]
    assert (last["loss"], last["loss_per_level"], last["grad_norm"]) == (0.5, [0.5, None], 0.5)
    assert (last["images"], last["epoch"]) == (18, 1.8)
    tracking.MetricsLog(path, 0, pictures=10, B=3)
    assert path.read_text() == ""
