"""Claims about combining objectives' gradients: worked examples, optimality, and slow references on the vectors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.update.combination import CAGRAD_RADIUS, CombinationMethod, combination_weights, gradient_cosines
from grpo.update.gradients import combine_gradients, gram_matrix

METHODS: list[CombinationMethod] = ["sum", "pcgrad", "cagrad", "mgda"]


def vectors(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def combined(gradients: Tensor, method: CombinationMethod, seed: int = 0) -> list[float]:
    return combine_gradients(gradients, method=method, seed=seed).tolist()


def random_gradients(seed: int, num_objectives: int, size: int) -> Tensor:
    return torch.randn(
        num_objectives, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )  # [O, D]


# Small integers make ties, right angles, duplicates and zero vectors common; that is where the branches are.
small_vectors = st.integers(2, 4).flatmap(
    lambda o: st.lists(st.lists(st.integers(-3, 3), min_size=2, max_size=2), min_size=o, max_size=o)
)


# --- sum


@pytest.mark.parametrize("method", METHODS)
def test_one_objectives_gradient_is_returned_unchanged(method: CombinationMethod) -> None:
    gradient = random_gradients(0, 1, 7).float()
    assert torch.equal(combine_gradients(gradient, method=method), gradient[0])


def test_sum_adds() -> None:
    assert combined(vectors([1, 2], [3, -5], [0, 1]), "sum") == [4.0, -2.0]


# --- pcgrad


def test_pcgrad_projects_each_of_two_conflicting_gradients_onto_the_others_normal_plane() -> None:
    # g1.g2 = -1, |g1|^2 = 1, |g2|^2 = 2: g1 + g2/2 = (0.5, 0.5), g2 + g1 = (0, 1)
    assert combined(vectors([1, 0], [-1, 1]), "pcgrad") == pytest.approx([0.5, 1.5])


def test_pcgrad_is_the_sum_where_no_pair_conflicts() -> None:
    assert combined(vectors([1, 0], [1, 1], [0, 2]), "pcgrad") == [2.0, 3.0]


def test_pcgrad_projects_on_the_original_of_the_other_gradient() -> None:
    # were g2 already projected to (0, 1), g1 would keep its (-1, 1) . (0, 1) >= 0 and stay whole: (-1, 1) + (0, 1)
    assert combined(vectors([-1, 1], [1, 0]), "pcgrad") == pytest.approx([0.5, 1.5])


def test_opposed_gradients_leave_pcgrad_nothing() -> None:
    assert combined(vectors([2, 0], [-1, 0]), "pcgrad") == pytest.approx([0.0, 0.0], abs=1e-15)


def projected(gradients: list[list[float]], i: int, order: Sequence[int]) -> list[float]:
    """The paper's inner loop on the vectors themselves."""
    running = list(gradients[i])
    for j in order:
        other = gradients[j]
        inner, squared = math.fsum(map(math.prod, zip(running, other, strict=True))), math.fsum(x * x for x in other)
        if inner < 0 and squared > 0:
            running = [x - inner / squared * y for x, y in zip(running, other, strict=True)]
    return running


def pcgrad_by_any_order(gradients: Tensor) -> list[list[float]]:
    """What every combination of orders gives."""
    rows = gradients.tolist()
    options = [
        [projected(rows, i, order) for order in itertools.permutations(j for j in range(len(rows)) if j != i)]
        for i in range(len(rows))
    ]
    return [[math.fsum(x) for x in zip(*choice, strict=True)] for choice in itertools.product(*options)]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_objectives=st.integers(2, 4), size=st.integers(1, 5))
def test_pcgrad_is_what_some_order_of_the_slow_projections_gives(seed: int, num_objectives: int, size: int) -> None:
    gradients = random_gradients(seed, num_objectives, size)
    ours = combined(gradients, "pcgrad", seed)
    expected = pcgrad_by_any_order(gradients)
    assert min(math.dist(ours, each) for each in expected) < 1e-10


def test_the_seed_alone_decides_pcgrads_orders() -> None:
    gradients = vectors([1, 0, 0], [-1, 1, 0.3], [-1, -2, 0.5])  # all conflict: 2 orders for each of 3
    by_seed = [tuple(round(x, 9) for x in combined(gradients, "pcgrad", seed)) for seed in range(60)]
    assert by_seed == [tuple(round(x, 9) for x in combined(gradients, "pcgrad", seed)) for seed in range(60)]
    possible = {tuple(round(x, 9) for x in each) for each in pcgrad_by_any_order(gradients)}
    assert set(by_seed) == possible  # and every order comes up


# --- cagrad


def test_cagrad_stretches_the_mean_where_the_gradients_mirror_each_other() -> None:
    # g_w = (3, y): 9 + 0.4 * 3 * sqrt(9 + y^2) is least at y = 0, so d = 1.4 g0 = (4.2, 0); twice that
    assert combined(vectors([3, 1], [3, -1]), "cagrad") == pytest.approx([8.4, 0.0], abs=1e-9)


def test_cagrad_leans_toward_the_gradient_that_the_mean_hurts() -> None:
    # g0 = 1, g_w = y in [-1, 3]: y + 0.4 |y| is least at y = -1, so d = 1 - 0.4 = 0.6; twice that
    assert combined(vectors([-1, 0], [3, 0]), "cagrad") == pytest.approx([1.2, 0.0])


def test_cagrad_inside_the_simplex_gives_both_objectives_the_same_gain() -> None:
    # g0 = (0.2, 1); equal gains put d on (0, z), the ball's edge at 0.04 + (z - 1)^2 = 0.16 * 1.04, so
    # z = 1 + sqrt(0.1264) = 1.3555278; d - g0 is along g_w = (-0.5625, 1), between the two. Twice d:
    gradients = vectors([1.2, 1], [-0.8, 1])
    assert combined(gradients, "cagrad") == pytest.approx([0.0, 2.7110555], abs=1e-7)


def worst_gain(gradients: Tensor, direction: Tensor) -> Tensor:
    """min_i g_i . d for directions [..., D]: what CAGrad makes large."""
    return (direction @ gradients.T).amin(dim=-1)


@settings(max_examples=80, deadline=None)
@given(rows=small_vectors)
def test_no_direction_in_cagrads_ball_has_a_better_worst_gain(rows: list[list[int]]) -> None:
    gradients = vectors(*rows)
    mean = gradients.mean(dim=0)
    direction = combine_gradients(gradients, method="cagrad") / len(rows)
    radius = CAGRAD_RADIUS * float(mean.norm())
    assert float((direction - mean).norm()) <= radius * (1 + 1e-9) + 1e-12
    angles = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
    on_circle = torch.stack([angles.cos(), angles.sin()], dim=-1)  # [angles, 2]
    ball = mean + radius * torch.linspace(0, 1, 21, dtype=torch.float64)[:, None, None] * on_circle
    best = float(worst_gain(gradients, ball).max())
    weights = combination_weights(gradients @ gradients.T, method="cagrad")
    if torch.equal(weights, torch.ones_like(weights)):  # |g_w| = 0: g0 stands in, where nothing helps every objective
        assert best <= 1e-9
    else:
        assert float(worst_gain(gradients, direction)) >= best - 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_objectives=st.integers(2, 6), size=st.integers(1, 8))
def test_cagrads_weights_are_optimal_by_duality(seed: int, num_objectives: int, size: int) -> None:
    # min_i g_i.d <= max over the ball = min over w of g_w.g0 + c |g0| |g_w|; where a w and a d meet, both are optimal
    gradients = random_gradients(seed, num_objectives, size)
    mean = gradients.mean(dim=0)
    radius = CAGRAD_RADIUS * float(mean.norm())
    weights = combination_weights(gradients @ gradients.T, method="cagrad") - 1  # O c |g0| / |g_w| * w
    if float(weights.sum()) < 1e-9:
        return  # |g_w| = 0
    weights = weights / weights.sum()
    assert bool((weights >= -1e-12).all())
    point = weights @ gradients
    direction = combine_gradients(gradients, method="cagrad") / num_objectives
    dual = float(point @ mean + radius * point.norm())
    assert float(worst_gain(gradients, direction)) == pytest.approx(dual, rel=1e-7, abs=1e-7)


def test_an_objective_without_a_gradient_leaves_cagrad_the_sum() -> None:
    assert combined(vectors([0, 0], [3, 1], [1, 1]), "cagrad") == [4.0, 2.0]  # g_w = 0: d = g0, times O


def test_gradients_that_cancel_leave_cagrad_nothing() -> None:
    assert combined(vectors([0.1, 0.7], [0.2, -0.9], [-0.3, 0.2]), "cagrad") == pytest.approx([0, 0], abs=1e-12)


# --- mgda


def test_mgda_inside_the_simplex_is_the_foot_of_the_perpendicular() -> None:
    # on the line from (2, 0) to (0, 1) nearest to 0: w1 = (g2 - g1).g2 / |g1 - g2|^2 = 1/5, (0.4, 0.8); twice that
    assert combined(vectors([2, 0], [0, 1]), "mgda") == pytest.approx([0.8, 1.6])


def test_mgda_is_the_shortest_gradient_where_it_is_nearest() -> None:
    assert combined(vectors([3, 1], [1, 0]), "mgda") == pytest.approx([2.0, 0.0])  # (g2 - g1).g2 < 0: w = (0, 1)


def test_mgda_stops_where_a_combination_of_gradients_is_zero() -> None:
    # Pareto-stationary: no direction helps all three
    assert combined(vectors([1, 0], [-1, 1], [-1, -1]), "mgda") == pytest.approx([0.0, 0.0], abs=1e-12)
    assert combined(vectors([0, 0], [5, 1]), "mgda") == [0.0, 0.0]


@settings(max_examples=100, deadline=None)
@given(rows=small_vectors)
def test_no_point_of_the_hull_is_shorter_than_mgdas(rows: list[list[int]]) -> None:
    gradients = vectors(*rows)
    shortest = combine_gradients(gradients, method="mgda") / len(rows)
    steps = 12
    grid = [w for w in itertools.product(range(steps + 1), repeat=len(rows)) if sum(w) == steps]  # the simplex
    hull = torch.tensor(grid, dtype=torch.float64) / steps @ gradients
    assert float(shortest.norm()) <= float(hull.norm(dim=-1).min()) + 1e-10


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_objectives=st.integers(2, 12),
    size=st.integers(1, 12),
    scales=st.lists(st.floats(-6, 6), min_size=12, max_size=12),
)
def test_mgdas_point_is_in_the_hull_and_no_gradient_is_behind_it(
    seed: int, num_objectives: int, size: int, scales: list[float]
) -> None:
    # x is the hull's nearest point to 0 if and only if x.g_j >= x.x for every j, at scales from 1e-6 to 1e6
    gradients = random_gradients(seed, num_objectives, size) * 10 ** vectors(scales[:num_objectives]).T
    weights = combination_weights(gradients @ gradients.T, method="mgda") / num_objectives
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(weights.min()) >= 0
    point = weights @ gradients
    slack = gradients @ point - point @ point
    # what rounding leaves in the inner products of what the point is made of
    reach = float(weights @ gradients.norm(dim=-1))
    assert bool((slack >= -1e-12 * reach * (reach + gradients.norm(dim=-1))).all())


@pytest.mark.timeout(20)
def test_the_search_for_the_shortest_vector_ends_where_only_rounding_is_left() -> None:
    # these went round for ever where "shorter" was judged between two ways of rounding the same squared norm
    for seed in (3986, 9557):
        scales = 10 ** torch.linspace(-6, 6, 11, dtype=torch.float64)[:, None]
        gradients = random_gradients(seed, 11, 6) * scales
        shortest = combine_gradients(gradients, method="mgda") / 11
        assert float(shortest.norm()) <= float(gradients[0].norm())


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_mgda_of_near_duplicates_is_as_short_as_either(distance: float) -> None:
    gradients = vectors([1, 0, 1], [1, distance, 1], [1, -distance, 1], [-0.5, 0, 1])
    # the hull's edge between (1, 0, 1) and (-0.5, 0, 1) passes (0, 0, 1); times 4
    assert combined(gradients, "mgda") == pytest.approx([0, 0, 4], abs=1e-6)


# --- all of them


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), num_objectives=st.integers(2, 4), power=st.sampled_from([-30, -3, 5, 30]))
@pytest.mark.parametrize("method", METHODS)
def test_scaling_all_gradients_scales_the_result(
    method: CombinationMethod, seed: int, num_objectives: int, power: int
) -> None:
    gradients = random_gradients(seed, num_objectives, 5)
    scaled = combine_gradients(gradients * 10.0**power, method=method, seed=seed)
    expected = combine_gradients(gradients, method=method, seed=seed) * 10.0**power
    assert float((scaled - expected).norm()) <= 1e-8 * float(gradients.norm()) * 10.0**power


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), num_objectives=st.integers(2, 5))
@pytest.mark.parametrize("method", ["sum", "cagrad", "mgda"])
def test_the_order_of_the_objectives_does_not_matter(
    method: CombinationMethod, data: st.DataObject, seed: int, num_objectives: int
) -> None:
    gradients = random_gradients(seed, num_objectives, 4)
    order = data.draw(st.permutations(range(num_objectives)))
    shuffled = combined(gradients[order], method)
    assert shuffled == pytest.approx(combined(gradients, method), abs=1e-6)


def test_the_order_of_two_objectives_does_not_matter_to_pcgrad() -> None:
    gradients = vectors([1, 0, 2], [-3, 1, 0])
    assert combined(gradients.flip(0), "pcgrad") == pytest.approx(combined(gradients, "pcgrad"))


@pytest.mark.parametrize("num_objectives", [2, 3, 4])
@pytest.mark.parametrize(("method", "factor"), [("sum", 1.0), ("pcgrad", 1.0), ("mgda", 1.0), ("cagrad", 1.4)])
def test_identical_gradients_give_their_sum_and_cagrad_stretches_it(
    method: CombinationMethod, factor: float, num_objectives: int
) -> None:
    # mgda: the hull is one point. cagrad: the whole ball agrees on g, so d = g + 0.4 g
    gradients = vectors([0.3, -1.7, 2.2]).repeat(num_objectives, 1)
    expected = (factor * num_objectives * gradients[0]).tolist()
    assert combined(gradients, method) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_all_zero_give_zero(method: CombinationMethod) -> None:
    assert combined(torch.zeros(3, 4, dtype=torch.float64), method) == [0.0] * 4


@pytest.mark.parametrize("method", ["sum", "pcgrad", "cagrad"])
def test_an_objective_without_a_gradient_does_not_turn_the_others(method: CombinationMethod) -> None:
    assert combined(vectors([2, 1], [0, 0], [1, 1]), method) == [3.0, 2.0]


@pytest.mark.parametrize("method", METHODS)
def test_the_combination_is_its_weights_times_the_gradients(method: CombinationMethod) -> None:
    gradients = random_gradients(5, 3, 50)
    weights = combination_weights(gradients @ gradients.T, method=method, seed=3)
    expected = (weights @ gradients).tolist()
    assert combined(gradients, method, 3) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("method", ["pcgrad", "cagrad", "mgda"])
def test_combining_each_micro_batch_and_adding_up_is_not_combining_the_window(method: CombinationMethod) -> None:
    first, second = vectors([1, 0], [-1, 1]), vectors([1, 0], [2, 0.5])
    per_micro_batch = combine_gradients(first, method=method) + combine_gradients(second, method=method)
    per_window = combine_gradients(first + second, method=method)
    assert float((per_window - per_micro_batch).norm()) > 0.1
    if method == "pcgrad":  # the window's (2, 0) and (1, 1.5) do not conflict, though the first micro-batch's do
        assert per_window.tolist() == [3.0, 1.5]
        assert per_micro_batch.tolist() == pytest.approx([0.5 + 3, 1.5 + 0.5])


@pytest.mark.parametrize("method", METHODS)
def test_pieces_of_the_gradients_on_several_ranks_combine_like_the_whole(method: CombinationMethod) -> None:
    gradients = random_gradients(8, 3, 10)
    pieces = [gradients[:, :4], gradients[:, 4:]]
    whole = gram_matrix(pieces[0]) + gram_matrix(pieces[1])  # what an all-reduce leaves on each rank
    weights = combination_weights(whole, method=method, seed=2)
    joined = torch.cat([weights @ piece for piece in pieces])
    assert joined.tolist() == pytest.approx(combined(gradients, method, 2), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("num_objectives", [1, 2])
def test_a_gradient_that_is_not_finite_is_refused(method: CombinationMethod, value: float, num_objectives: int) -> None:
    gradients = torch.ones(num_objectives, 3)
    gradients[-1, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        combine_gradients(gradients, method=method)


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 2, 2)])
def test_what_is_not_one_row_per_objective_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[O, D\]"):
        combine_gradients(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\[O, O\]"):
        combination_weights(torch.zeros(shape), method="sum")


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'mean'.*pcgrad"):
        combine_gradients(torch.ones(1, 2), method="mean")  # pyright: ignore[reportArgumentType]


def test_the_input_is_left_alone_and_the_result_has_its_dtype() -> None:
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.bfloat16)
    before = gradients.clone()
    result = combine_gradients(gradients, method="pcgrad")
    assert torch.equal(gradients, before)
    assert result.dtype == torch.bfloat16
    assert result.tolist() == [0.5, 1.5]


def test_inner_products_of_float32_gradients_are_summed_in_float64() -> None:
    # in float32, 2^-24 added to 1 is lost, however often
    size = 3_000_000  # more than is widened at a time
    gradients = torch.full((1, size), 2.0**-12)  # squares are 2^-24
    gradients[0, 0] = 1.0
    assert gram_matrix(gradients).tolist() == [[1.0 + (size - 1) * 2.0**-24]]


def test_cosines_are_worked_from_the_inner_products() -> None:
    gradients = vectors([3, 4], [4, -3], [-6, -8], [5, 0])
    cosines = gradient_cosines(gradients @ gradients.T)
    expected = [[1, 0, -1, 0.6], [0, 1, 0, 0.8], [-1, 0, 1, -0.6], [0.6, 0.8, -0.6, 1]]  # (3, 4).(5, 0) / 25 = 0.6
    torch.testing.assert_close(cosines, torch.tensor(expected, dtype=torch.float64))


def test_a_gradient_of_norm_zero_has_no_cosine_and_spoils_no_other() -> None:
    gradients = vectors([1e-120, 0], [0, 0], [0, 1e-120])  # whose squares do not underflow, but their product does
    cosines = gradient_cosines(gradients @ gradients.T)
    assert torch.isnan(cosines).tolist() == [[False, True, False], [True, True, True], [False, True, False]]
    assert cosines[[0, 2]][:, [0, 2]].tolist() == [[1.0, 0.0], [0.0, 1.0]]
