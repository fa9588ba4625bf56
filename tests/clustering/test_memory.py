"""What is remembered, worked by hand and against a dict that is written one image at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydc.clustering.memory import FeatureMemory


def write(memory: FeatureMemory, view: int, *rows: tuple[int, int, float]) -> None:
    """(image_id, step, value) each; the feature is (value, -value)."""
    ids, steps, values = (np.array(column) for column in zip(*rows, strict=True))
    memory.write(view, ids, steps, np.stack([values, -values], 1).astype(np.float32))


def values(memory: FeatureMemory, view: int = 0) -> list[float]:
    assert (memory.features[:, :, 1] == -memory.features[:, :, 0]).all(), "rows stay whole"
    return memory.features[view, :, 0].tolist()


def test_newer_wins_whoever_is_later():
    memory = FeatureMemory(3, 1)
    write(memory, 0, (0, 5, 0.5), (1, 5, 1.5), (2, 5, 2.5))
    write(memory, 0, (0, 6, 10.0), (1, 4, 11.0))
    assert values(memory) == [10.0, 1.5, 2.5]
    assert memory.when.tolist() == [[6, 5, 5]]


@pytest.mark.parametrize("later_first", [False, True])
def test_the_order_in_which_two_workers_arrive_does_not_matter(later_first):
    memory = FeatureMemory(2, 1)
    arrivals = [((0, 7, 7.0), (1, 8, 8.0)), ((0, 9, 9.0), (1, 6, 6.0))]
    for rows in arrivals[::-1] if later_first else arrivals:
        write(memory, 0, *rows)
    assert values(memory) == [9.0, 8.0]


def test_at_equal_steps_the_later_call_wins():
    """A start that went back to the last commit sends the same steps again."""
    memory = FeatureMemory(1, 1)
    write(memory, 0, (0, 3, 1.0))
    write(memory, 0, (0, 3, 2.0))
    assert values(memory) == [2.0]


def test_of_an_image_that_comes_twice_in_a_call_the_last_stays():
    memory = FeatureMemory(2, 1)
    write(memory, 0, (1, 3, 1.0), (0, 3, 2.0), (1, 3, 3.0), (1, 4, 4.0))
    assert values(memory) == [2.0, 4.0]
    assert memory.when.tolist() == [[3, 4]]
    write(memory, 0, (1, 2, 5.0), (1, 4, 6.0), (0, 1, 7.0))
    assert values(memory) == [2.0, 6.0], "of those that are new enough"


def test_an_image_is_missing_until_every_view_of_it_is_there():
    memory = FeatureMemory(3, 2)
    assert memory.missing().tolist() == [True, True, True]
    write(memory, 0, (0, 1, 1.0), (2, 1, 1.0))
    assert memory.missing().tolist() == [True, True, True]
    write(memory, 1, (2, 1, 1.0), (1, 1, 1.0))
    assert memory.missing().tolist() == [True, True, False]


def test_views_do_not_touch_each_other():
    memory = FeatureMemory(2, 2)
    write(memory, 0, (0, 5, 1.0), (1, 5, 2.0))
    write(memory, 1, (0, 4, 3.0))
    assert values(memory, 0) == [1.0, 2.0]
    assert values(memory, 1)[0] == 3.0


def test_older_images_are_those_with_any_view_of_before():
    """Image 0 is new in both views, 1 in one of them, 2 in none, and 3 was never there."""
    memory = FeatureMemory(4, 2)
    write(memory, 0, (0, 10, 0.0), (1, 10, 0.0), (2, 3, 0.0))
    write(memory, 1, (0, 10, 0.0), (1, 9, 0.0), (2, 3, 0.0))
    assert [memory.num_older(step) for step in (3, 4, 10, 11)] == [0, 1, 2, 3]


def test_features_are_kept_as_float32_whatever_comes():
    memory = FeatureMemory(1, 1)
    memory.write(0, np.array([0]), np.array([1]), np.array([[0.1, 0.2]], np.float64))
    assert memory.features.dtype == np.float32 and memory.when.dtype == np.int64


def test_a_saved_memory_goes_on_where_it_was():
    memory = FeatureMemory(3, 2)
    for view in (0, 1):
        write(memory, view, (0, 2**40, 1.0), (2, 7, 3.0 + view))
    state = {name: array.copy() for name, array in memory.state().items()}
    again = FeatureMemory.load(state)
    assert again.missing().tolist() == [False, True, False]
    write(again, 0, (0, 2**40 - 1, 9.0), (2, 8, 5.0))
    assert values(again) == [1.0, 0.0, 5.0]
    assert values(memory) == [1.0, 0.0, 3.0], "they share nothing"
    assert state["features"][0, 2, 0] == 3.0 and state["when"][0, 2] == 7, "nor with what was saved"


def test_a_memory_that_nothing_was_written_to_can_be_saved_too():
    again = FeatureMemory.load(FeatureMemory(3, 2).state())
    assert again.missing().all() and again.when.shape == (2, 3)


calls = st.lists(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.floats(-9, 9, width=32)), min_size=1), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(calls)
def test_any_calls_leave_what_a_dict_would(batches):
    memory, kept = FeatureMemory(5, 1), {}
    for rows in batches:
        rows = sorted(rows, key=lambda row: row[1])  # steps do not fall within a call
        write(memory, 0, *rows)
        for image_id, step, value in rows:
            if image_id not in kept or step >= kept[image_id][0]:
                kept[image_id] = step, value
    assert memory.missing().tolist() == [n not in kept for n in range(5)]
    for image_id, (step, value) in kept.items():
        assert memory.when[0, image_id] == step
        assert memory.features[0, image_id, 0] == np.float32(value)
