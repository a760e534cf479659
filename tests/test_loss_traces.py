"""The debug forms of recipes train as they did when tests/golden/traces was written (anew: see loss_traces.py).

Bit by bit where torch, CPU and threads are the same, else within TOLERANCE.
"""

import json
from pathlib import Path

import loss_traces
import pytest
import ranks

from pipeline.trainer import leave

NAMES = ("chain-finetune", "chain-pretrain", "demo-chain", "demo-pretrain", "finetune_1k", "shampoo")
TOLERANCE = 2e-2


def record(root: Path) -> None:
    loss_traces.record(root)
    leave(0)


@pytest.fixture(scope="module")
def traces(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("traces")
    ended = ranks.run_function(record, (root,), root / "logs", 1).wait()
    assert ended.codes == [0], ended.outputs
    return root / "traces"


def test_every_trace_is_compared(traces):
    for folder in (traces, loss_traces.GOLDEN):
        assert sorted(path.stem for path in folder.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_training_is_what_it_was(traces, name):
    found, golden = (json.loads((folder / f"{name}.json").read_text()) for folder in (traces, loss_traces.GOLDEN))
    assert found["data"] == golden["data"], "the images are others: Pillow encodes them otherwise"
    assert len(golden["loss"]) == loss_traces.STEPS
    assert found.keys() == golden.keys()
    if found["environment"] == golden["environment"]:
        assert found == golden
    else:
        assert loss_traces.difference(found, golden) < TOLERANCE
