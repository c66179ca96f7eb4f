import json

import numpy as np
import pytest
from scipy import linalg, stats
from sklearn.metrics import pairwise
from sklearn.neighbors import NearestNeighbors

import tracking
from evaluation import metrics
from training import Metrics

RANDOM = np.random.default_rng(0)


def pictures(n):
    return RANDOM.integers(0, 256, (n, 3, 5, 2), dtype=np.uint8)


def features(n, d, shift=0.0):
    """Skew, mostly small numbers, but no two rows alike."""
    normal = RANDOM.normal(size=(n, d)) + shift
    return np.where(normal > 0, normal, normal / 10)


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
    samples = pictures(500)
    distance = metrics.distances(samples, samples)
    own = np.arange(500)
    assert metrics.top(metrics.ranks(distance, own), 1) == 1
    shuffled = metrics.ranks(distance, RANDOM.permutation(500))
    assert metrics.top(shuffled, 1) < 0.02
    assert abs(metrics.top(shuffled, 250) - 0.5) < 0.1


@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_by_hand(k):
    assert metrics.top(np.array([0, 1, 2, 2]), k) == [0.25, 0.5, 1][k - 1]


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (3, 7), (7, 7), (1, 1000)])
def test_share_is_wilsons_interval(hits, n):
    share = metrics.share(np.arange(n) < hits)
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    np.testing.assert_allclose(share, (hits / n, expected.low, expected.high), atol=1e-12)
    assert share.low <= share.value <= share.high


def unbiased_mmd(real, samples):
    options = {"degree": 3, "gamma": 1 / real.shape[1], "coef0": 1}
    xx, yy, xy = (
        pairwise.polynomial_kernel(a, b, **options) for a, b in ((real, real), (samples, samples), (real, samples))
    )
    return xx[~np.eye(len(xx), dtype=bool)].mean() + yy[~np.eye(len(yy), dtype=bool)].mean() - 2 * xy.mean()


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 13), (1200, 1050)])
def test_kid_is_the_unbiased_estimate_of_scikit_learns_kernel(n, m):
    real, samples = features(n, 6), features(m, 6, 0.3)
    np.testing.assert_allclose(metrics.kid(real, samples).value, unbiased_mmd(real, samples), rtol=1e-9)


def test_kid_is_what_random_subsets_average_to():
    real, samples = features(60, 5), features(70, 5, 0.5)
    subsets = [
        unbiased_mmd(RANDOM.permutation(real)[:20], RANDOM.permutation(samples)[:20]) for _ in range(500)
    ]  # the published recipe
    assert abs(np.mean(subsets) - metrics.kid(real, samples).value) < 4 * np.std(subsets) / 500**0.5


def test_kid_of_two_halves_of_one_set_covers_0_as_often_as_its_error_says():
    pool, off = features(120, 20), []
    for _ in range(400):
        shuffled = RANDOM.permutation(pool)
        estimate = metrics.kid(shuffled[:60], shuffled[60:])
        off.append(estimate.value / estimate.error)
    assert 0.94 <= np.mean(np.abs(off) < metrics.Z) < 1
    assert 0.8 < np.std(off) < 1.1


@pytest.mark.parametrize(("n", "m", "shift"), [(60, 60, 0.0), (40, 90, 0.3), (90, 40, 1.0)])
def test_the_error_of_kid_is_the_spread_of_its_values_over_fresh_samples(n, m, shift):
    samples = [metrics.kid(features(n, 8), features(m, 8, shift)) for _ in range(500)]
    spread = np.std([estimate.value for estimate in samples])
    typical = np.sqrt(np.mean([estimate.error**2 for estimate in samples]))
    assert 0.85 < typical / spread < 1.3


def test_frechet_of_gaussian_fits_that_commute_is_the_closed_form():
    a = np.array([[1.0, 0], [-1, 0], [0, 2], [0, -2]]) * np.sqrt(3 / 2)  # mean 0, covariance diag(1, 4)
    b = np.array([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) * np.sqrt(3 / 2) + [5, 7]  # covariance diag(9, 1)
    assert metrics.frechet(a, b) == pytest.approx(25 + 49 + (3 - 1) ** 2 + (2 - 1) ** 2)


def test_frechet_is_the_formula_with_scipys_matrix_root():
    a, b = features(80, 7), features(50, 7, 0.4) @ RANDOM.normal(size=(7, 7))
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariance_a @ covariance_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root)
    assert metrics.frechet(a, b) == pytest.approx(expected)
    assert metrics.frechet(b, a) == pytest.approx(expected)


def test_frechet_with_fewer_pictures_than_features_does_not_depend_on_the_axes_and_is_0_for_one_set():
    a, b = features(9, 30), features(11, 30, 0.4)
    turn = linalg.qr(RANDOM.normal(size=(30, 30)))[0]
    assert metrics.frechet(a @ turn, b @ turn) == pytest.approx(metrics.frechet(a, b))
    padded = [np.hstack([x, np.zeros((len(x), 5))]) for x in (a, b)]
    assert metrics.frechet(*padded) == pytest.approx(metrics.frechet(a, b))
    assert abs(metrics.frechet(a, a)) < 1e-5


def test_neighbours_are_scikit_learns_where_all_training_pictures_differ():
    training, samples = features(1100, 12), features(1030, 12)
    distance, index = NearestNeighbors(n_neighbors=30).fit(training).kneighbors(samples)
    spread = np.sqrt(((training - training.mean(0)) ** 2).sum(1).mean())
    found = metrics.neighbours(samples, training)
    np.testing.assert_array_equal(found.index[:, 0], index[:, 0])
    for row, (first, second) in enumerate(found.index):
        differing = np.linalg.norm(training[index[row]] - training[first], axis=1) > metrics.TWIN * spread
        assert index[row][differing][0] == second
        np.testing.assert_allclose(found.distance[row], [distance[row, 0], distance[row][differing][0]])


def test_the_training_set_is_copied_whole_even_where_it_holds_pictures_twice():
    training = features(40, 30)
    doubled = np.concatenate([training, training[:9], training[:5] + 1e-7]).astype(np.float32)
    found = metrics.neighbours(doubled, doubled)
    assert found.copied.all()
    np.testing.assert_array_equal(found.distance[:49, 0], 0)


def test_fresh_pictures_are_no_copies_and_blurred_ones_are():
    training = features(300, 30)
    assert metrics.neighbours(features(200, 30), training).copied.mean() < 0.02
    assert metrics.neighbours(training + 0.03 * RANDOM.normal(size=(300, 30)), training).copied.all()


def test_a_copy_is_one_nearer_than_a_third_of_the_way_to_the_next():
    line = np.array([[0.0], [3.0]])
    samples = np.array([[0.7], [0.8], [-1.4], [-1.6], [2.3]])
    np.testing.assert_array_equal(
        metrics.neighbours(samples, line).copied, [True, False, True, False, True]
    )  # |0.75| of 3 and |-1.5| of 3 are the boundaries


def test_r_precision_is_the_rank_of_scikit_learns_cosine():
    picture_emb, text_emb, own = features(50, 6), features(80, 6), RANDOM.permutation(80)[:50]
    cosine = pairwise.cosine_similarity(picture_emb, text_emb)
    for k in (1, 10):
        expected = [own[i] in np.argsort(-cosine[i])[:k] for i in range(50)]
        np.testing.assert_array_equal(metrics.r_precision(picture_emb, text_emb, own, k), expected)
    assert metrics.r_precision(3 * text_emb, text_emb, np.arange(80)).all()
    assert not metrics.r_precision(np.zeros((80, 6)), text_emb, np.arange(80)).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.share(np.zeros(0, bool)), "a share needs at least 1 rows of `hits`, got 0"),
        (lambda: metrics.kid(features(9, 2), features(3, 2)), "KID needs at least 4 rows of `samples`, got 3"),
        (
            lambda: metrics.frechet(features(1, 2), features(9, 2)),
            "Fréchet distance needs at least 2 rows of `a`, got 1",
        ),
        (lambda: metrics.neighbours(features(3, 2), features(1, 2)), "at least 2 rows of `training`, got 1"),
        (lambda: metrics.neighbours(features(3, 2), np.ones((5, 2))), "need 2 different training pictures"),
        (lambda: metrics.r_precision(features(1, 2), features(1, 2), np.array([0])), "2 rows of `text_emb`, got 1"),
        (
            lambda: metrics.kid(np.full((9, 2), np.nan), features(9, 2)),
            "numbers of `real` are infinite or not a number",
        ),
    ],
)
def test_too_few_or_broken_rows_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_resumed_log_drops_what_came_after_its_checkpoint_and_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"st}')
    log = tracking.MetricsLog(path, 4, 0.0, pictures=10, B=3)
    with log.paused():
        pass
    none = np.int32(0)
    log.write(6, Metrics(np.array([3.0, 0.0]), np.array([6.0, 0.0]), np.float32(1), none, none))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    last = lines[-1]
    assert (last["loss"], last["loss_per_level"], last["grad_norm"]) == (0.5, [0.5, None], 0.5)
    assert (last["images"], last["epoch"]) == (18, 1.8)
    tracking.MetricsLog(path, 0, 0.0, pictures=10, B=3)
    assert path.read_text() == ""


def test_texture_by_hand_where_a_plain_half_meets_another():
    """Noise of ± 1 in a chequered pattern has |Laplacian| 8; the edge between the halves is told apart from it."""
    image = np.full((2, 16, 16, 3), 100, np.int16)
    image[:, :, 8:] += 100
    image[1] += np.where(np.add.outer(np.arange(16), np.arange(16)) % 2, 1, -1)[:, :, None]
    flat, edges = metrics.texture(image.astype(np.uint8))
    np.testing.assert_allclose(flat, [0, 8])
    assert edges[0] > 30
    blank, no_edges = metrics.texture(np.zeros((1, 9, 9, 1), np.uint8))
    assert blank == [0]
    assert np.isnan(no_edges).all()


def test_steps_across_patches_are_those_of_the_pictures_elsewhere_unless_the_patches_show():
    smooth = np.broadcast_to(np.arange(16, dtype=np.uint8)[None, :, None, None] * 3, (1, 16, 16, 1)).copy()
    smooth = smooth + smooth.swapaxes(1, 2)
    np.testing.assert_allclose(metrics.border_steps(smooth, 4), 1)
    tiles = smooth + 6 * np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((4, 4), np.uint8))[None, :, :, None]
    np.testing.assert_allclose(metrics.border_steps(tiles.astype(np.uint8), 4), 2)  # 9 and 3 by turns, inside 3
    assert metrics.border_steps(tiles.astype(np.uint8), 5) < 1
