"""A run with an evaluation.crop_pct of its own: evaluation, prediction and export see its images alike."""

import json

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from pipeline.augment.exact import EvalTransform
from pipeline.predict import load_checkpoint, predict
from pipeline.record import last_evaluation
from tools import export


def test_evaluation_prediction_and_export_agree(finished, shards, tmp_path):
    """`finished` fine-tuned on 16 px, and is evaluated on the middle 16 of 32."""
    run, out = finished / "finetune", tmp_path / "out"
    assert export.main([str(run), str(out)]) == 0
    ours, exported = load_checkpoint(run), load_checkpoint(out)
    assert ours.view.transform == EvalTransform(16, 0.5)
    assert json.loads((out / "config.json").read_text())["pretrained_cfg"]["crop_pct"] == 0.5
    assert (
        "the shorter side resized to 32 px (bicubic), the centre of 16 x 16 px cut out"
        in (out / "README.md").read_text()
    )
    paths, right = sorted((shards.parent / "val").glob("*/*.jpg")), 0
    for path in paths:
        pixels = ours.view.transform.pixels(Image.open(path))
        middle = CenterCrop(16)(Resize(32, InterpolationMode.BICUBIC)(Image.open(path)))
        np.testing.assert_array_equal(pixels, np.asarray(middle))
        np.testing.assert_array_equal(exported.view.transform.pixels(Image.open(path)), pixels)
        answer = predict(ours, path)
        assert predict(exported, path) == answer
        right += answer["pred_class"] == path.parent.name
    assert right / len(paths) == pytest.approx(last_evaluation(run)["ema_memory_top1"])
    assert len(paths) == 23
