"""Exported weights: what timm, torch.export, ONNX and the hub make of them, and what is refused."""

import base64
import json
import pickle
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import huggingface_hub
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoint.whole import file_names, flushed_hash, seal
from pipeline.export.formats import write_torch_export
from tools.export import main

CHECKPOINT = "checkpoints/step-00000008"
TIMMS = {"README.md", "config.json", "model.safetensors"}


def made_again(out: Path) -> torch.nn.Module:
    """As the model card says."""
    config = json.loads((out / "config.json").read_text())
    weights = out / "model.safetensors"
    return timm.create_model(config["architecture"], checkpoint_path=weights, **config["model_args"]).eval()


@pytest.mark.parametrize(
    ("source", "options", "weights"),
    [
        ("", [], "weights/ema.safetensors"),
        ("", ["--weights", "model"], "weights/model.safetensors"),
        ("", ["--weights", "best_ema"], "weights/best_ema.safetensors"),
        ("weights/best_model.safetensors", [], "weights/best_model.safetensors"),
        (CHECKPOINT, [], "weights/ema.safetensors"),
        (CHECKPOINT, ["--weights", "model"], "weights/model.safetensors"),
    ],
)
def test_timm_loads_what_was_exported(finished, tmp_path, source, options, weights):
    out = tmp_path / "out"
    assert main([str(finished / "finetune" / source), str(out), *options]) == 0
    expected = load_file(finished / "finetune" / weights)
    torch.testing.assert_close(dict(made_again(out).state_dict()), expected, rtol=0, atol=0)
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    torch.testing.assert_close(dict(again.state_dict()), expected, rtol=0, atol=0)
    assert again.num_classes == 5
    assert list(again.pretrained_cfg["mean"]) == [0.485, 0.456, 0.406]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_the_model_card_tells_where_the_weights_are_from(finished, tmp_path):
    licences = ["--licence", "apache-2.0", "--data-licence", "ImageNet's terms: research, education"]
    assert main([str(finished / "finetune"), str(tmp_path / "out"), *licences]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    state = json.loads((finished / "finetune" / CHECKPOINT / "state.json").read_text())
    evaluated = json.loads((finished / "finetune" / "metrics.jsonl").read_text().splitlines()[-1])
    for fact in (
        "license: apache-2.0\n",
        "averaged weights of a training run after 8 steps",
        f"memory_top1 {evaluated['ema_memory_top1']:.4f}",
        "| these weights | apache-2.0 |",
        "| the data they were trained on | ImageNet's terms: research, education |",
        "| the weights they started from | unknown |",
        f"- Run `finetune`: 8 steps on split `train` of `{state['recipe']['data.path']}`, "
        f"index fingerprint {state['data']['fingerprint']}; commit {state['commit']}; 1 ranks of ddp",
        f"- It started from `{finished}/pretrain/weights/ema.safetensors`, SHA-256 ",
        "- Run `pretrain`: 8 steps",
        "- It started from scratch.",
        '"schedule.length": "8 steps"',
    ):
        assert fact in card, fact
    assert state["commit"] != "unknown"


def test_a_card_says_what_is_not_known(finished, tmp_path):
    alone = shutil.copytree(finished / "finetune", tmp_path / "alone", ignore=shutil.ignore_patterns("checkpoints"))
    recipe = json.loads((alone / "recipe.json").read_text()) | {"model.start": "nosuch/weights/model.safetensors"}
    (alone / "recipe.json").write_text(json.dumps(recipe))
    assert main([str(alone), str(tmp_path / "out"), "--licence", "ask me"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: other\n" in card
    assert "index fingerprint unknown; commit unknown; unknown ranks" in card
    evaluated = json.loads((alone / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"after 8 steps.\n\nMeasured by the run on split `val` of `{recipe['data.path']}`: memory_top1 " in card
    assert f"{evaluated['ema_memory_top1']:.4f}" in card
    assert "SHA-256 unknown: the file is not here any more\n- The run that made those is not known here." in card


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch's own
def test_torch_export_computes_the_same(finished, tmp_path, capsys):
    assert main([str(finished / "finetune"), str(tmp_path / "out"), "--torch-export"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TIMMS, "model.pt2"}
    assert capsys.readouterr().out.count("logits within") == 2
    images = torch.randn(5, 3, 16, 16)
    found = torch.export.load(tmp_path / "out" / "model.pt2").module()(images)
    torch.testing.assert_close(found, made_again(tmp_path / "out")(images), rtol=0, atol=1e-5)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch's own
def test_onnx_computes_the_same(finished, tmp_path, capsys):
    assert main([str(finished / "finetune"), str(tmp_path / "out"), "--onnx"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*TIMMS, "model.onnx"}
    print(capsys.readouterr().out)
    images = torch.randn(5, 3, 16, 16)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"image": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), made_again(tmp_path / "out")(images), rtol=0, atol=1e-4)


class Otherwise(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean(dim=(2, 3)) + torch.rand(3)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_format_that_computes_otherwise_is_no_export(tmp_path):
    told = r"model.pt2 computes other logits than the model: they differ by .*, more than 0.0001; nothing was exported"
    with pytest.raises(RuntimeError, match=told):
        write_torch_export(Otherwise(), torch.randn(3, 3, 8, 8), tmp_path / "model.pt2")


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks of the hub while it uploads small files; `files`: what came, by name."""

    files: ClassVar[dict[str, bytes]] = {}
    status: ClassVar[int] = 200

    def do_GET(self) -> None:
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"{huggingface_hub.constants.ENDPOINT}/me/model"})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": name, **regular} for name in names]})
        elif "/commit/" in self.path:
            values = [json.loads(line)["value"] for line in body.splitlines()[1:]]
            self.files.update({value["path"]: base64.b64decode(value["content"]) for value in values})
            self.answer({"commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/model/commit/1", "commitOid": "1"})
        else:
            self.answer({})

    def answer(self, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Stays silent."""


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_none")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield Hub
        server.shutdown()
        thread.join()


def test_what_was_exported_is_pushed_whole(finished, tmp_path, hub, capsys):
    out = tmp_path / "out"
    assert main([str(finished / "finetune"), str(out), "--push", "me/model"]) == 0
    assert "/me/model/commit/1" in capsys.readouterr().out
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(hub.files) == TIMMS


def test_a_hub_that_does_not_let_us_in(finished, tmp_path, hub, monkeypatch, capsys):
    monkeypatch.setattr(hub, "status", 403)
    told = refused(capsys, finished / "finetune", tmp_path / "out", "--push", "me/model")
    assert "out is exported, but cannot be pushed to me/model (" in told
    assert "log in with `hf auth login` or set HF_TOKEN" in told


def refused(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


class Code:
    """What it does when it is unpickled must never happen."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code ran')",)


def seal_again(path: Path) -> None:
    """Of whoever made it: all hashes match."""
    for name in ("manifest.json", "COMMITTED"):
        (path / name).unlink()
    seal(path, {name: flushed_hash(path / name) for name in file_names(path)})


def test_no_code_in_a_checkpoint_is_run(finished, tmp_path, capsys):
    path = shutil.copytree(finished / "finetune" / CHECKPOINT, tmp_path / "step-00000001")
    contents = path / "engine" / ".metadata"
    contents.write_bytes(pickle.dumps(Code()))
    assert "checkpoint that is whole (engine/.metadata: its SHA-256" in refused(capsys, path, tmp_path / "out")
    seal_again(path)
    told = refused(capsys, path, tmp_path / "out")
    assert ".metadata: builtins.exec has no place in a table of contents: this is no checkpoint of a run" in told
    state = json.loads((path / "state.json").read_text()) | {"strategy": "zero2"}
    (path / "state.json").write_text(json.dumps(state))
    seal_again(path)
    assert "was saved by zero2, whose files are pickles" in refused(capsys, path, tmp_path / "out")
    weights = shutil.copytree(finished / "finetune", tmp_path / "run") / "weights" / "ema.safetensors"
    weights.write_bytes(pickle.dumps(Code()))
    assert "ema.safetensors is not a safetensors file" in refused(capsys, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(finished, tmp_path, capsys):
    run, out = finished / "finetune", tmp_path / "out"
    assert f"{finished} is no run directory (it has no recipe.json)" in refused(capsys, finished, out)
    assert f"{out} is no run directory" in refused(capsys, out, out)
    told = refused(capsys, run / "weights" / "ema.safetensors", out, "--weights", "model")
    assert "are the weights 'ema', and no 'model'" in told
    told = refused(capsys, run / CHECKPOINT, out, "--weights", "best_ema")
    assert "has no weights 'best_ema': give --weights model or ema" in told
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "own").touch()
    assert main([str(run), str(out)]) == 0
    capsys.readouterr()
    assert (tmp_path / "out.tmp" / "own").exists(), "somebody's own"
    assert f"{out} exists: an export is written whole, into a new directory" in refused(capsys, run, out)
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("weights"))
    assert "has no weights 'ema', only []: a run writes model and ema when it is finished" in refused(
        capsys, other, "x"
    )
    (other / "weights").mkdir()
    save_file({"head.weight": torch.zeros(5, 24)}, other / "weights" / "ema.safetensors")
    assert "ema.safetensors is a checkpoint of another model: " in refused(capsys, other, "x")
    (other / "recipe.json").write_text('{"seed": 0}')
    assert "recipe.json is of an older version, and lacks fields that recipes have now" in refused(capsys, other, "x")
