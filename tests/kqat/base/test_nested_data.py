"""`flat_data`: nested structures become one level; what has one level stays as it is."""

import numpy as np

from kqat.base import flat_data

A, B, C = np.zeros((2, 1)), np.ones((2, 3)), np.full((2, 4), 2.0)


def test_keys_of_dicts_inside_dicts_are_joined() -> None:
    flat = flat_data({"img": A, "meta": {"age": B, "more": {"w": C}}}, 3)
    assert list(flat) == ["img", "meta_age", "meta_more_w"] and flat["meta_more_w"] is C
    assert list(flat_data({"p": [A, B], "q": C}, 3)) == ["p_0", "p_1", "q"]


def test_lists_become_as_many_arrays_as_the_model_has_inputs() -> None:
    assert [id(x) for x in flat_data([A, [B, C]], 3)] == [id(A), id(B), id(C)]
    # Keras flattens a dict in the order of its keys.
    assert [id(x) for x in flat_data(({"y": B, "x": A}, C), 3)] == [id(A), id(B), id(C)]


def test_one_level_stays_as_it_is() -> None:
    for data in (A, [A, B], {"a": A}, [[1.0, 2.0], [3.0, 4.0]], [A, [B, C]]):
        assert flat_data(data, 2) is data


def test_data_of_the_models_structure_go_by_its_keys() -> None:
    structure = {"b": [1, 2], "a": {"y": 3, "x": 4}}
    data = {"b": (A, B), "a": {"x": C, "y": A}}
    assert [id(x) for x in flat_data(data, 4, structure)] == [id(C), id(A), id(A), id(B)]
    for other in ({**data, "b": [A]}, {"b": [A, B], "c": data["a"]}, {**data, "b": A}):
        assert isinstance(flat_data(other, 4, structure), dict)
