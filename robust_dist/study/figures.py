"""Figures of robustness: how high a grid of hyperparameters lies, and how little it moves. Pure functions.

A grid is an array [..., cells] of one figure a cell (higher is better, in percentage points), and a figure of
robustness reduces the last dimension. Sources: the paper's pair of mean and variance; learning-rate sensitivity
after Wortsman et al. 2023 (arXiv 2309.14322); the expected best of k trials after Sivaprasad et al. 2020 (arXiv
1910.11758).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Any]
TRIALS = (1, 2, 4, 8)
NEAR_POINTS = 0.5
# All flips are counted where there are no more than this, all resamples where there are no more than the draws. SciPy's
# permutation_test and bootstrap draw otherwise, which would change published p values and intervals.
_EXACT = 2**16
_DRAWS = 10_000


def mean(cells: Array) -> Any:
    """Mean over the grid."""
    return np.mean(cells, axis=-1)


def variance(cells: Array) -> Any:
    """Mean squared distance from the mean over the grid, divided by the number of cells.

    This is the paper's division: its 0.11 over the 25 cells of Table 3 is 0.113 this way, and 0.117 with n - 1.
    """
    return np.var(cells, axis=-1)


def lowest(cells: Array) -> Any:
    """The worst cell."""
    return np.min(cells, axis=-1)


def highest(cells: Array) -> Any:
    """The best cell."""
    return np.max(cells, axis=-1)


def sensitivity(cells: Array) -> Any:
    """Mean over the grid of best minus cell: what a setting chosen blindly costs.

    Wortsman et al. 2023 define learning-rate sensitivity as the mean over learning rates of loss minus best loss, where
    a loss is capped at that of initialisation. Here it is accuracy, and a diverged cell counts as guessing, their cap.
    """
    return np.max(cells, axis=-1) - np.mean(cells, axis=-1)


def expected_best(cells: Array, trials: int) -> Any:
    """The expected best of k different cells chosen at random, exactly.

    Of n cells sorted upwards, the i-th (from 1) is the best of k with probability C(i-1, k-1) / C(n, k). The draws are
    without replacement, as a setting of a grid is not trained twice. (Sivaprasad et al. 2020 have random search, with
    independent draws; for k far below n the two agree.)

    Args:
        cells: One figure a cell [..., n].
        trials: k, from 1 to n.

    Raises:
        ValueError: k is not in that range.
    """
    n = cells.shape[-1]
    if not 1 <= trials <= n:
        raise ValueError(f"trials={trials} must be from 1 to the number of cells, {n}")
    weights = [comb(rank, trials - 1) / comb(n, trials) for rank in range(n)]
    return np.sort(cells, axis=-1) @ np.array(weights)


def near_best(cells: Array, points: float = NEAR_POINTS) -> Any:
    """Share of the grid that lies within `points` of its best cell."""
    # A difference of exactly `points` is within, whatever rounding makes of it.
    return np.mean(cells >= np.max(cells, axis=-1, keepdims=True) - points - 1e-9, axis=-1)


def figures_of(num_cells: int) -> dict[str, Statistic]:
    """Every figure by its name, for a grid of `num_cells` cells (no more trials than cells)."""
    named: dict[str, Statistic] = {
        "mean": mean,
        "variance": variance,
        "min": lowest,
        "max": highest,
        "best minus mean": sensitivity,
    }
    for k in TRIALS:
        if k <= num_cells:
            named[f"best of {k}"] = partial(expected_best, trials=k)
    return named | {f"share within {NEAR_POINTS:g}": near_best}


def bootstrap(grid: Array, figure: Statistic, *, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of a figure of the cells' means, from resampling the seeds with replacement.

    A seed is drawn for all cells at once, since it gives them the same initial weights and order. Up to 5 seeds all
    resamples are used, else 10,000 are drawn. With few seeds the interval is coarse, and too narrow.

    Args:
        grid: Figures [cells, seeds], complete.
        figure: One of `figures_of`.
        level: The interval's coverage.
        seed: Seeds the draws.

    Returns:
        The interval, or None with fewer than 2 seeds.
    """
    num_seeds = grid.shape[1]
    if num_seeds < 2:
        return None
    means = _resamples(num_seeds, seed) @ grid.T
    values = figure(means)
    low = np.quantile(values, (1 - level) / 2, method="lower")
    return float(low), float(np.quantile(values, (1 + level) / 2, method="higher"))


def _resamples(num_seeds: int, seed: int) -> Array:
    """The weight of each seed in each resample [resamples, seeds]."""
    if num_seeds**num_seeds <= _DRAWS:
        draws = np.array(list(product(range(num_seeds), repeat=num_seeds)))
    else:
        draws = np.random.default_rng(seed).integers(num_seeds, size=(_DRAWS, num_seeds))
    return np.stack([np.mean(draws == number, axis=1) for number in range(num_seeds)], axis=1)


@dataclass(frozen=True)
class PairedTest:
    """A comparison of two contenders, pair by pair.

    Attributes:
        pairs: The number of pairs.
        difference: Mean of first minus second.
        p: Two-sided probability of a mean difference at least as large, if the two were alike in every pair.
        exact: Whether all flips were counted.
    """

    pairs: int
    difference: float
    p: float
    exact: bool


def paired_test(first: Array, second: Array, *, seed: int = 0) -> PairedTest:
    """The sign-flip permutation test of the mean difference over pairs.

    A pair is one cell with one seed, trained by both. If the two are exchangeable, the sign of each difference is
    random. All 2^n flips are counted for n <= 16 pairs; else 10,000 are drawn, and p is (1 + as extreme) / (1 + drawn).
    The pairs of a cell share its peculiarities, so the test is about these cells, not about learning rates in
    general.

    Args:
        first: Figures [n] of one contender.
        second: Figures [n] of the other, of the same cells and seeds.
        seed: Seeds the drawn flips.

    Raises:
        ValueError: There is no pair, or the lengths differ.
    """
    if len(first) != len(second) or len(first) == 0:
        raise ValueError(f"a paired test needs pairs, but got {len(first)} and {len(second)} figures")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    n, observed = len(differences), abs(float(np.mean(differences)))
    exact = 2**n <= _EXACT
    if exact:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_DRAWS, n))
    # A tie within rounding counts as equally extreme.
    extreme = int(np.sum(np.abs(signs @ differences) / n >= observed - 1e-9))
    p = extreme / len(signs) if exact else (1 + extreme) / (1 + len(signs))
    return PairedTest(n, float(np.mean(differences)), p, exact)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the given order: each stands for the whole family of tests (Holm 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted
