"""Numbers and figures of the report on inputs of which the answer is known."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from search.figures import pareto_front
from search.finished import busy_minutes
from search.numbers import wilson


def test_wilson_against_the_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and none of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


def test_minutes_leave_out_the_time_in_which_nothing_ran():
    def span(start: int, end: int) -> tuple[datetime, datetime]:
        zero = datetime(2030, 1, 1)
        return zero + timedelta(minutes=start), zero + timedelta(minutes=end)

    # Two at once, then a pause of an hour, then two more.
    assert busy_minutes([span(0, 3), span(1, 2), span(62, 63), span(63, 65)]) == [3, 2, 4, 6]


def test_the_front_holds_what_no_other_beats():
    points = [(3, 0.9), (1, 0.5), (2, 0.5), (2, 0.8), (2, 0.7), (4, 0.9), (2, 0.8)]
    assert pareto_front(points) == [1, 3, 6, 0]
