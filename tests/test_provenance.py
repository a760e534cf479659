"""Where weights come from: provenance.json of stages that write a line, and tools/provenance.py."""

import json
import re
import shutil

from written import Written, three

from pipeline.chain.records import write_provenance
from pipeline.chain.stage import hashes
from shards.index import Index
from tools import provenance


def test_what_goes_in_is_noted_before_any_work(do, tmp_path, capsys):
    assert do([Written("first", "a", stopped=True)])[0] == "requeue"
    found = json.loads((tmp_path / "first" / "provenance.json").read_text())
    assert found.keys() == {"inputs", "commit", "stage", "directory", "data"}
    assert provenance.main([str(tmp_path / "first")]) == 0
    assert re.fullmatch(rf"first: {tmp_path}/first \(code .+\), unfinished\n", capsys.readouterr().out)


def test_provenance_leads_from_the_end_to_the_beginning(do, tmp_path):
    do(three())
    found = json.loads((tmp_path / "second" / "provenance.json").read_text())
    made_by = found["start"].pop("made_by")
    assert found.keys() == {"inputs", "start", "commit", "stage", "directory", "data", "outputs"}
    assert found["start"] == {"file": f"{tmp_path}/first/weights/line"}
    handed = found["inputs"]["weights of first"]
    assert made_by["outputs"] == {"weights/line": {"size": 2, "sha256": handed}}
    assert made_by["inputs"] == {"text": "a"}


def test_a_line_of_provenance_that_no_longer_holds(do, tmp_path, capsys):
    do(three())
    (tmp_path / "first" / "weights" / "line").write_text("y\n")
    assert provenance.main([str(tmp_path / "second"), "--check"]) == 1
    assert f"differs: {tmp_path}/first/weights/line: sha256 was " in capsys.readouterr().out
    assert provenance.main([str(tmp_path)]) == 2
    assert f"{tmp_path} has no provenance.json above it: only stages of a chain keep one" in capsys.readouterr().err
    assert provenance.main([str(tmp_path / "second" / "gone")]) == 2
    assert f"{tmp_path}/second/gone: no such file or directory; give the directory" in capsys.readouterr().err


def test_a_stage_that_was_moved_is_compared_where_it_is(do, tmp_path, capsys):
    do(three())
    shutil.copytree(tmp_path / "second", tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    assert provenance.main([str(tmp_path / "copy" / "weights" / "line"), "--check"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"not there to be compared: {tmp_path}/first/weights/line",
        "everything that is still there is as it was noted",
    ]
    (tmp_path / "copy" / "weights" / "line").write_text("z\n")
    assert provenance.main([str(tmp_path / "copy"), "--check"]) == 1
    assert f"differs: {tmp_path}/copy/weights/line: sha256 was " in capsys.readouterr().out


def test_data_that_is_no_longer_what_weights_were_made_of(tmp_path, shards, capsys):
    data, index = shutil.copytree(shards, tmp_path / "data"), Index.read(shards)
    splits = {name: hashes(index, name) for name in ("train", "val")}
    write_provenance(tmp_path / "stage", {"inputs": {}, "data": str(data), "splits": splits})
    assert provenance.main([str(tmp_path / "stage"), "--check"]) == 0
    manifest = json.loads((data / "index.json").read_text())
    del manifest["splits"]["val"]
    (data / "index.json").write_text(json.dumps(manifest | {"classes": ["renamed", *index.classes[1:]]}))
    assert provenance.main([str(tmp_path / "stage"), "--check"]) == 1
    train, val = capsys.readouterr().out.splitlines()[-2:]
    assert train.startswith(f"differs: {data}, split train: its fingerprint was {index.fingerprint('train')}, is ")
    assert f"{data}, split val: its fingerprint was {index.fingerprint('val')}, but no split 'val' in" in val
    shutil.rmtree(data)
    assert provenance.main([str(tmp_path / "stage"), "--check"]) == 0
    assert f"not there to be compared: {data}, splits train, val\n" in capsys.readouterr().out
