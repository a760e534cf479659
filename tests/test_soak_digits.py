"""`make soak`: debug recipes, as they are, learn scikit-learn's handwritten digits."""

import pytest
import ranks

pytestmark = pytest.mark.soak


@pytest.mark.parametrize("model", ["t2t_vit_t_14", "t2t_vit_14"])
def test_t2t_vit_learns_them(digits, start, tmp_path, model):
    options = ["--debug", "--model", model, "--data.path", str(digits), "--run-dir", str(tmp_path / "run")]
    ended = start("recipes/t2t_vit.py", options).wait()
    assert ended.codes == [0], ended.outputs
    last = ranks.metrics(tmp_path / "run")[-1]
    print(f"\n{model}: {last['ema_head_top1']:.4f} of the digits, averaged weights; {last['head_top1']:.4f}, raw")
    assert last["ema_head_top1"] >= 0.95
    assert last["head_top1"] >= 0.95
