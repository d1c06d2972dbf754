"""Config nodes become objects from the inside out, each mistake named before anything is built."""

import pytest

from tuner.config import loads
from tuner.engine.assemble import Assembly, assemble
from tuner.errors import UserError


class Part:
    built = 0

    def __init__(self, *, size: int, inner: object = None) -> None:
        Part.built += 1
        self.size, self.inner = size, inner


@pytest.fixture(autouse=True)
def _count_from_zero():
    Part.built = 0


def test_nodes_are_built_from_the_inside_out_in_dicts_lists_and_tuples():
    whole = assemble({"type": Part, "size": 1, "inner": [{"a": ({"type": Part, "size": 2}, "text")}]})
    assert whole.size == 1
    assert whole.inner[0]["a"][0].size == 2
    assert whole.inner[0]["a"][1] == "text"


def test_a_named_node_is_one_object_wherever_it_stands():
    named = {"type": Part, "size": 3}
    assembly = Assembly({"tokenizer": dict(named), "seed": 0})
    first = assembly.build({"type": Part, "size": 1, "inner": dict(named)})
    assert first.inner is assembly.build(dict(named))
    assert Part.built == 2


def test_equal_nodes_without_a_name_stay_two_objects():
    node = {"type": Part, "size": 3}
    policy, reference = Assembly({"model": {"type": dict, "llm": node}}).build([dict(node), dict(node)])
    assert policy is not reference


def test_an_unknown_argument_is_named_with_near_ones_before_anything_is_built():
    with pytest.raises(UserError, match=r"Part has no argument 'sise'. Did you mean size"):
        assemble({"type": Part, "sise": {"type": Part, "size": 1}})
    assert Part.built == 0


def test_a_missing_argument_is_named():
    with pytest.raises(UserError, match="Part needs size"):
        assemble({"type": Part})


def test_a_config_whose_types_are_imported_late_shares_its_named_nodes():
    config = loads(
        "from types import SimpleNamespace\n"
        "part = dict(type=SimpleNamespace, a=1)\n"
        "whole = dict(type=SimpleNamespace, part=part, deeper=dict(type=SimpleNamespace, part=part))\n"
    )
    assembly = Assembly(config)
    whole = assembly.build(config.whole)
    assert whole.part is whole.deeper.part is assembly.build(config.part)
