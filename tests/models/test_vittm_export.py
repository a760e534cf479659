"""ViTTM as one graph: compiled, and exported to torch and ONNX. Each option by itself is left to `make soak`."""

import pytest
from graphs import check_compiles, check_exports
from variants import MIXED, VARIANTS, mixed


def test_the_models_of_this_file_have_every_option():
    assert {name for names in MIXED for name in names} == VARIANTS.keys()


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_compiles_without_graph_break(names):
    check_compiles(mixed(names), "aot_eager", depth=1)


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_exports(names):
    check_exports(mixed(names), any_batch=names == ("default",), depth=1)
