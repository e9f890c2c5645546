"""Gram matrix of the objectives' gradients -> one weight per objective. Knows O x O numbers, never a gradient.

Every rule of FORMULAS 7 is a linear combination of the gradients whose weights follow from their inner products alone.
So gradients of any size, in pieces or spread over ranks, need only have their inner products added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

CombinationMethod = Literal["sum", "pcgrad", "cagrad", "mgda"]

CAGRAD_RADIUS = 0.4
"""CAGrad looks for its direction within this share of |g0| around the mean gradient g0: the paper's c."""
_NOISE = 1e-14
"""An inner product is known to about this share of the product of its norms: float64, summed over many entries."""
_HALVINGS = 64
"""Of CAGrad's bracket; a norm below 2^-64 of the largest gradient's counts as zero."""


def combination_weights(gram: Tensor, *, method: CombinationMethod, seed: int = 0) -> Tensor:
    """Weights whose combination of the gradients is the method's: combined = weights @ gradients.

    Args:
        gram: [O, O] inner products of the objectives' gradients over all entries that learn, in float64.
        method: `sum`, `pcgrad`, `cagrad` or `mgda`; the last two times O, so that all have the scale of `sum`.
        seed: of PCGrad's orders; the same on every rank, another in each window.
    Returns:
        [O] float64 on the CPU. One objective always has weight 1.
    Raises:
        ValueError: gram is not square, not finite (a gradient holds NaN or infinity), or the method is unknown.
    Source: PCGrad, Yu et al. 2020 (arXiv:2001.06782) algorithm 1; CAGrad, Liu et al. 2021 (arXiv:2110.14048)
        algorithm 1, with c = 0.4; MGDA, Desideri 2012 and Sener & Koltun 2018 (arXiv:1810.04650).
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"a Gram matrix is [O, O] with O >= 1, this one is {list(gram.shape)}")
    if method not in get_args(CombinationMethod):
        raise ValueError(f"the combination method is {method!r}; expected one of {get_args(CombinationMethod)}")
    gram = gram.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("a gradient holds NaN or infinity: the objectives' inner products are not finite")
    num_objectives = len(gram)
    largest = float(gram.diagonal().max())
    if method == "sum" or num_objectives == 1 or largest == 0:
        return torch.ones(num_objectives, dtype=torch.float64)
    gram = (gram + gram.T) / (2 * largest)  # a common factor changes no weight; now every norm is at most 1
    if method == "pcgrad":
        return _pcgrad_weights(gram, seed)
    if method == "cagrad":
        return _cagrad_weights(gram)
    return num_objectives * _min_norm_weights(gram)


def gradient_cosines(gram: Tensor) -> Tensor:
    """[O, O] cosines of the angles between gradients, from their [O, O] inner products; NaN where a norm is 0.

    The norms are the square roots of gram's diagonal.
    """
    norms = gram.diagonal().sqrt()
    has_direction = norms > 0
    scale = torch.where(has_direction, norms, torch.nan)
    return (gram / scale[:, None] / scale).clamp(-1.0, 1.0)  # one after the other: a product of norms can underflow


def named_cosines(gram: Tensor | None, names: Sequence[str]) -> dict[tuple[str, str], float]:
    """Pair of names -> `gradient_cosines` of [O, O] inner products, where it is one; nothing where there are none."""
    if gram is None:
        return {}
    cosines = gradient_cosines(gram)
    return {
        (first, second): float(cosines[i, j])
        for i, first in enumerate(names)
        for j, second in enumerate(names)
        if i < j and bool(torch.isfinite(cosines[i, j]))
    }


def named_norms(gram: Tensor | None, names: Sequence[str]) -> dict[str, float]:
    """Name -> norm of its gradient, from [O, O] inner products; nothing where there are none."""
    return {} if gram is None else {name: float(gram[o, o].sqrt()) for o, name in enumerate(names)}


def _pcgrad_weights(gram: Tensor, seed: int) -> Tensor:
    """Projections on coefficients: the running gradient i is coefficients @ gradients, starting as the i-th unit."""
    num_objectives = len(gram)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(num_objectives, dtype=torch.float64)
    for i in range(num_objectives):
        coefficients = torch.zeros(num_objectives, dtype=torch.float64)
        coefficients[i] = 1.0
        for j in torch.randperm(num_objectives, generator=generator).tolist():
            if j == i or gram[j, j] == 0:
                continue
            inner = coefficients @ gram[:, j]  # with the original gradient j
            if inner < 0:
                coefficients[j] -= inner / gram[j, j]
        weights += coefficients
    return weights


def _cagrad_weights(gram: Tensor) -> Tensor:
    """CAGrad's weights, times O.

    The w on the simplex that minimises g_w . g0 + s |g_w|, s = c |g0|, is found through s |g_w| = the minimum over
    t > 0 of (s/2)(|g_w|^2 / t + t). At a given t what is left, up to a constant, is |g_w + (t/s) g0|^2: a min-norm
    problem. Its minimum is convex in t with a slope of the sign of t - |g_w|, so t is found by halving.
    """
    num_objectives = len(gram)
    mean = torch.full((num_objectives,), 1 / num_objectives, dtype=torch.float64)  # [O] g0 = mean @ gradients
    plain = torch.ones(num_objectives, dtype=torch.float64)
    if _squared_norm(gram, mean) == 0:
        return plain
    with_mean = gram @ mean  # [O] g_i . g0
    mean_squared = mean @ with_mean
    radius = CAGRAD_RADIUS * mean_squared.sqrt()
    lower, upper = 0.0, 1.0  # no norm is above 1
    weights = mean
    for _ in range(2 * _HALVINGS):
        t = (lower + upper) / 2
        if t in (lower, upper) or upper < 2.0**-_HALVINGS:
            break
        shift = t / radius
        shifted = gram + shift * (with_mean[:, None] + with_mean) + shift**2 * mean_squared  # of the g_i + shift * g0
        weights = _min_norm_weights(shifted)
        if (weights @ gram @ weights).clamp(min=0.0).sqrt() > t:
            lower = t
        else:
            upper = t
    squared_norm = _squared_norm(gram, weights)
    if upper < 2.0**-_HALVINGS or squared_norm == 0:
        return plain  # g_w = 0 has no direction: g0 itself
    return plain + num_objectives * radius / squared_norm**0.5 * weights


def _squared_norm(gram: Tensor, weights: Tensor) -> float:
    """|weights @ gradients|^2; exactly 0 where rounding could account for all of it. weights are >= 0."""
    squared = float(weights @ gram @ weights)
    return squared if squared > _NOISE * float(weights @ gram.diagonal().sqrt()) ** 2 else 0.0


def _min_norm_weights(gram: Tensor) -> Tensor:
    """[O] simplex weights of the shortest vector in the convex hull of the vectors that have this Gram matrix.

    Wolfe 1976, "Finding the nearest point in a polytope": a support grows by the vector that shortens most, and shrinks
    where its affine minimum leaves the hull. The norm falls at every turn, so no support comes twice and it ends; for
    two vectors that is the closed form.
    """
    norms = gram.diagonal().clamp(min=0.0).sqrt()
    support = [int(norms.argmin())]
    weights = torch.zeros(len(gram), dtype=torch.float64)
    weights[support] = 1.0
    squared = float(gram[support[0], support[0]])
    while True:
        inner = gram @ weights  # [O] with the point
        reach = weights @ norms
        gain = squared - inner - _NOISE * reach * (reach + norms)
        gain[support] = -torch.inf
        entering = int(gain.argmax())
        if gain[entering] <= 0:
            return weights
        support, shorter = _shorten(gram, [*support, entering], weights)
        shorter_squared = float(shorter @ gram @ shorter)
        if not shorter_squared < squared:  # rounding is all that is left, or NaN
            return weights
        weights, squared = shorter, shorter_squared


def _shorten(gram: Tensor, support: list[int], weights: Tensor) -> tuple[list[int], Tensor]:
    """Toward the support's affine minimum; what falls to 0 on the way leaves. Returns what stays, and its weights."""
    while True:
        target = torch.zeros_like(weights)
        target[support] = _affine_minimum(gram[support][:, support])
        if not bool((target[support] <= 0).any()):
            return support, target
        blocking = [i for i in support if target[i] <= 0]
        steps = [float(weights[i] / (weights[i] - target[i])) if weights[i] > 0 else 0.0 for i in blocking]
        leaving = blocking[steps.index(min(steps))]
        weights = (weights + min(steps) * (target - weights)).clamp(min=0.0)
        weights[leaving] = 0.0
        support = [i for i in support if i != leaving]


def _affine_minimum(gram: Tensor) -> Tensor:
    """Coefficients of sum 1, of any sign, that make the shortest combination; not finite where it is not unique."""
    size = len(gram)
    norms = gram.diagonal().sqrt()  # above 0: a zero vector is where the search begins, and ends
    border = norms.min() / norms  # cosines, not inner products: norms that differ 1e6-fold would cost every digit
    system = torch.zeros(size + 1, size + 1, dtype=torch.float64)  # Lagrange: G a = multiplier * 1, sum a = 1
    system[:size, :size] = gram / norms[:, None] / norms
    system[size, :size] = system[:size, size] = border
    right = torch.zeros(size + 1, dtype=torch.float64)
    right[size] = 1.0
    solution, info = torch.linalg.solve_ex(system, right)
    if int(info):
        return torch.full((size,), torch.nan, dtype=torch.float64)
    return solution[:size] * border
