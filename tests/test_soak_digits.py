"""`make soak`: debug recipes, as they are, learn scikit-learn's handwritten digits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ranks

pytestmark = pytest.mark.soak
Learn = Callable[..., Path]


@pytest.fixture
def learn(digits, start, tmp_path) -> Learn:
    """learn(recipe, model, *options): trains a debug form to at least 95 % of the digits; its directory."""

    def train(recipe: str, model: str, *options: str) -> Path:
        run_dir = tmp_path / f"run-{len([*tmp_path.iterdir()])}"
        given = ["--debug", "--model", model, "--data.path", str(digits), "--run-dir", str(run_dir), *options]
        ended = start(f"recipes/{recipe}.py", given).wait()
        assert ended.codes == [0], ended.outputs
        last = ranks.metrics(run_dir)[-1]
        told = f"{last['ema_head_top1']:.4f} of the digits, averaged weights; {last['head_top1']:.4f}, raw"
        print(f"\n{model} {' '.join(options)}: {told}")
        assert last["ema_head_top1"] >= 0.95
        assert last["head_top1"] >= 0.95
        return run_dir

    return train


@pytest.mark.parametrize("model", ["t2t_vit_t_14", "t2t_vit_14"])
def test_t2t_vit_learns_them(learn, model):
    learn("t2t_vit", model)


@pytest.mark.parametrize("model", ["ltm_vit_small", "ltm_swin_tiny", "ltm_mobilevit_s", "ltm_efficientvit_b1"])
def test_ltm_learns_them(learn, model):
    learn("ltm", model)


@pytest.mark.parametrize("model", ["ltm_vit_small", "ltm_mobilevit_s"])
def test_ltm_learns_them_from_a_base(learn, model):
    """Which merges nothing; half of its epochs are enough then."""
    base = learn("ltm", model, "--model.compression-ratio", "1", "--bottleneck.weight", "0")
    half = "30 epochs" if model == "ltm_vit_small" else "10 epochs"
    start = str(base / "weights/ema.safetensors")
    learn("ltm", model, "--model.start", start, "--schedule.length", half, "--schedule.lr", "1e-3")
