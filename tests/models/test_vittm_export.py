"""ViTTM as one graph: compiled, and exported to torch and ONNX. Each option by itself is left to `make soak`."""

import pytest
from graphs import check_compiles, check_exports
from variants import MIXED, VARIANTS, build, mixed

EXPORTED = [MIXED[0], ("tl", "erase", "conv"), ("dyna", "add_erase", "latent")]


def test_the_models_of_this_file_have_every_option():
    assert {name for names in MIXED for name in names} == VARIANTS.keys()


@pytest.mark.parametrize("names", MIXED, ids="-".join)
def test_compiles_without_graph_break(names):
    check_compiles(build(mixed(names), depth=1), "aot_eager")


@pytest.mark.parametrize("names", EXPORTED, ids="-".join)
def test_exports(names):
    check_exports(build(mixed(names), depth=1), any_batch=names == ("default",))
