"""ViTTM as one graph: compiled, and exported to torch and ONNX. Each option by itself is left to `make soak`."""

import pytest
import variants
from variants import MIXED


def test_the_models_of_this_file_have_every_option():
    assert {name for names in MIXED for name in names} == variants.VARIANTS.keys()


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_compiles_without_graph_break(names):
    variants.check_compiles(variants.mixed(names), "aot_eager", depth=1)


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_exports(names):
    variants.check_exports(variants.mixed(names), depth=1)
