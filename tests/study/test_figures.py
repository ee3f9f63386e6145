"""Figures of robustness: hand-computed values, and brute force."""

from itertools import combinations, product

import numpy as np
import pytest

from robust_dist.study import figures

TABLE_3 = np.array(
    [
        [96.32, 96.49, 96.40, 96.65, 96.66],
        [96.90, 97.00, 96.85, 97.20, 97.34],
        [96.87, 97.20, 97.01, 97.40, 97.47],
        [97.04, 97.20, 97.43, 97.31, 97.27],
        [96.94, 97.38, 97.44, 97.29, 96.73],
    ]
).ravel()
# The proposed method's row of Table 2.
ROW = np.array([93.69, 95.88, 93.86])


def test_the_paper_s_mean_and_variance_of_table_3_come_out():
    assert round(figures.mean(TABLE_3), 2) == 97.03
    assert round(figures.variance(TABLE_3), 2) == 0.11
    assert round(float(np.var(TABLE_3, ddof=1)), 2) == 0.12


def test_hand_computed_figures_of_three_cells():
    assert figures.mean(ROW) == pytest.approx((93.69 + 95.88 + 93.86) / 3)
    assert figures.variance(ROW) == pytest.approx(((93.69 - 94.47667) ** 2 + 1.40333**2 + 0.61667**2) / 3, abs=1e-4)
    assert (figures.lowest(ROW), figures.highest(ROW)) == (93.69, 95.88)
    # (2.19 + 0 + 2.02) / 3
    assert figures.sensitivity(ROW) == pytest.approx(4.21 / 3)
    # Pairs: {93.69, 95.88} and {93.86, 95.88} have 95.88, {93.69, 93.86} has 93.86.
    assert figures.expected_best(ROW, 2) == pytest.approx((2 * 95.88 + 93.86) / 3)
    assert figures.expected_best(ROW, 1) == pytest.approx(figures.mean(ROW))
    assert figures.expected_best(ROW, 3) == 95.88


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_the_expected_best_is_the_mean_over_all_choices_of_k_different_cells(k):
    cells = np.random.default_rng(k).normal(size=7).round(1)  # with ties
    brute = np.mean([max(choice) for choice in combinations(cells, k)])
    assert figures.expected_best(cells, k) == pytest.approx(brute)


@pytest.mark.parametrize("k", [0, 4])
def test_more_trials_than_cells_or_none_are_refused(k):
    with pytest.raises(ValueError, match="trials"):
        figures.expected_best(ROW, k)


def test_the_area_near_the_best_counts_the_edge():
    assert figures.near_best(np.array([95.0, 94.5, 94.49, 90.0])) == 0.5
    # 95.3 - 0.5 is a bit more than 94.8 in binary.
    assert figures.near_best(np.array([95.3, 94.8])) == 1.0


def test_a_small_grid_has_no_figure_of_more_trials_than_cells():
    assert [name for name in figures.figures_of(3) if name.startswith("best of")] == ["best of 1", "best of 2"]
    assert "best of 8" in figures.figures_of(8)
    assert {name: function(ROW) for name, function in figures.figures_of(3).items()}["max"] == 95.88


def test_the_bootstrap_goes_through_every_resample_of_the_seeds_for_all_cells_at_once():
    grid = np.array([[1.0, 2.0, 6.0], [0.0, 5.0, 1.0]])
    values = []
    for columns in product(range(3), repeat=3):
        first, second = (np.mean([row[c] for c in columns]) for row in grid)
        values.append(max(first, second) - (first + second) / 2)
    # Of 27 values the 2.5 % lie before the second, the 97.5 % after the last but one.
    expected = min(values), max(values)
    assert figures.bootstrap(grid, figures.sensitivity) == pytest.approx(expected)


def test_the_bootstrap_covers_a_known_mean_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(60):
        low, high = figures.bootstrap(generator.normal(size=(1, 12)), figures.mean, seed=trial)
        hits += low <= 0 <= high
    assert 0.8 <= hits / 60 < 1


@pytest.mark.parametrize("name", figures.figures_of(8))
def test_a_figure_of_many_grids_at_once_is_that_of_each(name):
    function, grids = figures.figures_of(8)[name], np.random.default_rng(0).normal(size=(5, 8))
    assert function(grids) == pytest.approx([function(grid) for grid in grids])


def test_one_seed_has_no_interval():
    assert figures.bootstrap(np.ones((4, 1)), figures.mean) is None


def test_the_paired_test_is_the_share_of_sign_flips_that_are_as_extreme():
    first, second = np.array([3.0, 5.0, 2.0, 4.0]), np.array([1.0, 4.0, 2.5, 1.0])
    differences = first - second
    flips = [abs(np.dot(signs, differences)) for signs in product([1, -1], repeat=4)]
    brute = np.mean([flip >= abs(differences.sum()) - 1e-12 for flip in flips])
    test = figures.paired_test(first, second)
    assert (test.pairs, test.difference, test.p, test.exact) == (4, pytest.approx(1.375), pytest.approx(brute), True)
    assert test.p == 0.25  # by hand: 6.5 = 2+1+3+0.5 less 1; 6.5 and 5.5 up: +++-, ++++ and their mirror images


def test_equal_contenders_have_probability_1_and_ever_better_ones_the_least_there_is():
    assert figures.paired_test(ROW, ROW).p == 1.0
    assert figures.paired_test(ROW + 1, ROW).p == 2 / 2**3
    many = np.random.default_rng(0).normal(size=30)
    drawn = figures.paired_test(many + 1, many)
    assert (drawn.exact, drawn.pairs) == (False, 30)
    assert drawn.p == pytest.approx(1 / 10_001)


def test_drawn_flips_agree_with_all_flips():
    generator = np.random.default_rng(3)
    first, second = generator.normal(0.3, 1, 16), generator.normal(size=16)
    exact = figures.paired_test(first, second)
    drawn = figures.paired_test(np.append(first, 0.0), np.append(second, 0.0))  # a tie more changes nothing
    assert (exact.exact, drawn.exact) == (True, False)
    assert drawn.p == pytest.approx(exact.p, abs=0.02)


def test_a_test_without_pairs_is_refused():
    with pytest.raises(ValueError, match="pairs"):
        figures.paired_test(np.array([]), np.array([]))
