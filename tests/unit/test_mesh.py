"""Meshes of ranks: who shares what, which sizes are legal, and what is said about those that are not."""

import pytest

from tuner.errors import UserError
from tuner.parallel.mesh import Degrees, arrange, build_mesh, check_heads, legal_degrees, read_degrees
from tuner.parallel.ranks import Ranks


def test_neighbours_share_a_sequence_and_nearest_ones_its_heads():
    layout = arrange(16, Degrees(ulysses=4, ring=2))
    assert layout.ulysses == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert layout.ring == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert layout.sequence == [list(range(8)), list(range(8, 16))]
    assert layout.data == [[rank, rank + 8] for rank in range(8)]


@pytest.mark.parametrize("degrees", [Degrees(), Degrees(2), Degrees(1, 3), Degrees(4, 3), Degrees(12, 1)])
def test_every_rank_is_once_in_each_kind_of_group_and_has_the_place_that_its_number_says(degrees):
    layout = arrange(24, degrees)
    for groups in layout:
        assert sorted(rank for members in groups for rank in members) == list(range(24))
    for members in layout.sequence:
        for rank, member in enumerate(members):
            place, part = divmod(rank, degrees.ulysses)
            assert next(group for group in layout.ring if member in group).index(member) == place
            assert next(group for group in layout.ulysses if member in group).index(member) == part


def test_the_legal_degrees_of_the_published_models():
    assert legal_degrees(16, 8) == [1, 2, 4, 8, 16]  # 1.8B
    assert legal_degrees(32, 8) == [1, 2, 4, 8, 16, 32]  # 7B
    assert legal_degrees(48, 8) == [1, 2, 4, 8, 16, 24, 48]  # 20B
    assert legal_degrees(32, 32) == [1, 2, 4, 8, 16, 32]
    assert legal_degrees(12, 1) == [1, 2, 3, 4, 6, 12]


def test_sizes_that_do_not_fit_are_refused_with_those_that_would():
    with pytest.raises(UserError, match=r"over 3 ranks does not fit 8 ranks.*Sizes that do: 1, 2, 4, 8\."):
        arrange(8, Degrees(3))
    with pytest.raises(UserError, match=r"over 16 ranks \(ulysses=8, ring=2\) does not fit 8 ranks"):
        arrange(8, Degrees(8, 2))
    with pytest.raises(UserError, match="does not fit 1 rank,"):
        build_mesh(Degrees(2))
    with pytest.raises(
        UserError, match=r"12 ranks cannot share 48 query heads and 8 kv heads.*: 1, 2, 4, 8, 16, 24, 48"
    ):
        check_heads(48, 8, 12)
    with pytest.raises(UserError, match=r'sequence_parallel_size = {"ulysses": 32, "ring": 2}'):
        check_heads(32, 8, 64)


def test_a_setting_is_a_number_or_both_degrees():
    assert read_degrees(8) == Degrees(8, 1)
    assert read_degrees({"ulysses": 8, "ring": 2}) == Degrees(8, 2)
    assert read_degrees({"ring": 2}).size == 2
    for setting in (0, -2, True, "two", {"ulysses": 2.0}, {"ulises": 2}, {"ring": 0}):
        with pytest.raises(UserError, match=r'Give a number of ranks from 1, such as 8, or {"ulysses": 8, "ring": 2}'):
            read_degrees(setting)


def test_one_process_needs_no_group():
    mesh = build_mesh(Degrees())
    assert [ranks.members for ranks in (mesh.ulysses, mesh.ring, mesh.sequence, mesh.data)] == [(0,)] * 4
    with pytest.raises(AssertionError, match="need a process group"):
        Ranks([0, 1], 0)
