from __future__ import annotations

import threading

import pytest

from mvrec_core.prefetch import ahead


def test_all_come_in_order_and_one_is_made_ahead():
    made: list[int] = []
    second = threading.Event()

    def numbers():
        for n in range(5):
            made.append(n)
            if n == 1:
                second.set()
            yield n

    coming = ahead(numbers())
    assert next(coming) == 0 and second.wait(10)  # though nobody asked for it
    assert list(coming) == [1, 2, 3, 4] == made[1:]
    assert list(ahead([])) == []


def test_what_making_one_raises_comes_in_its_place():
    def broken():
        yield 1
        raise ValueError("第二个")

    coming = ahead(broken())
    assert next(coming) == 1
    with pytest.raises(ValueError, match="第二个"):
        next(coming)
