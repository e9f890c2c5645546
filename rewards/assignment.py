"""The best one-to-one pairing of two lists. Knows numbers only.

scipy's linear_sum_assignment does the same, but nothing else here needs scipy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_pairs(values: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column), each row and column at most once, with the largest sum of values.

    Args:
        values: [R, C] finite numbers; min(R, C) pairs are made, those worth 0 as well.
    Returns:
        Pairs sorted by row.
    Source: the Hungarian method with potentials, Kuhn 1955 and Munkres 1957; O(R^2 C).
    """
    if not values or not values[0]:
        return []
    if len(values) > len(values[0]):
        transposed = list(zip(*values, strict=True))
        return sorted((row, column) for column, row in best_pairs(transposed))
    num_rows, num_columns = len(values), len(values[0])
    row_potential = [0.0] * (num_rows + 1)
    column_potential = [0.0] * (num_columns + 1)
    row_of = [0] * (num_columns + 1)  # counted from 1; 0 is free, and column 0 holds the row being placed
    for row in range(1, num_rows + 1):
        row_of[0], column = row, 0
        slack = [math.inf] * (num_columns + 1)
        came_from = [0] * (num_columns + 1)
        is_visited = [False] * (num_columns + 1)
        while row_of[column]:
            is_visited[column] = True
            unvisited = [other for other in range(1, num_columns + 1) if not is_visited[other]]
            here = row_of[column]
            for other in unvisited:
                reduced = -values[here - 1][other - 1] - row_potential[here] - column_potential[other]
                if reduced < slack[other]:
                    slack[other], came_from[other] = reduced, column
            nearest = min(unvisited, key=slack.__getitem__)
            step = slack[nearest]
            for other in range(num_columns + 1):
                if is_visited[other]:
                    row_potential[row_of[other]] += step
                    column_potential[other] -= step
                else:
                    slack[other] -= step
            column = nearest
        while column:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    return sorted((row_of[column] - 1, column - 1) for column in range(1, num_columns + 1) if row_of[column])
