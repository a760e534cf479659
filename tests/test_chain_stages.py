"""What a chain decides to do with each stage: with stages whose work is to write a line (written.py)."""

import json
import shutil
from dataclasses import replace

import pytest
from written import Written, three

from pipeline import chain, report
from pipeline.recipe import Augment, Data, Model, Recipe, Schedule
from pipeline.record import read_outcome, write_outcome
from shards.errors import UserError


def lines(root, *directories):
    return [(root / name / "weights" / "line").read_text() for name in directories]


def test_several_start_from_one_and_are_skipped_then(do, tmp_path):
    assert do(three()) == ["done", *(f"stage {name}: {name}: begins" for name in ("first", "second", "third"))]
    assert lines(tmp_path, "first", "second", "third") == ["a\n", "a\nb\n", "a\nc\n"]
    assert read_outcome(tmp_path) == {"outcome": "done", "step": 3, "reason": "every stage is finished"}
    skipped = [f"stage {name}: {name}: finished before, skipped" for name in ("first", "second", "third")]
    assert do(three()) == ["done", *skipped]
    assert lines(tmp_path, "second") == ["a\nb\n"], "once"


def test_what_an_input_makes_stale_is_done_again_beside_the_old(do, tmp_path):
    do(three())
    assert do(three(b="new"))[1:] == [
        "stage first: first: finished before, skipped",
        "stage second: second-2: begins again, second stays: its inputs changed: text: 'b' there, 'new' now",
        "stage third: third: finished before, skipped",
    ]
    assert lines(tmp_path, "second", "second-2") == ["a\nb\n", "a\nnew\n"]
    assert do(three())[2] == "stage second: second: finished before, skipped", "what was done is never done again"
    assert do(three(b="new"))[2] == "stage second: second-2: finished before, skipped"
    said = do(three(a="other", b="new"))
    assert "first-2: begins again, first stays: its inputs changed: text: 'a' there, 'other' now" in said[1]
    assert "second-3: begins again, second-2 stays: its inputs changed: weights of first: " in said[2]
    assert said[2].endswith("'what it is yet to leave' now")
    assert lines(tmp_path, "first-2", "second-3", "third-2") == ["other\n", "other\nnew\n", "other\nc\n"]
    stages = json.loads((tmp_path / "chain.json").read_text())["stages"]
    assert stages[1] == {
        "name": "second",
        "kind": "written",
        "after": ["first"],
        "run_dir": "second-3",
        "earlier": ["second", "second-2"],
    }


def test_an_unfinished_stage_goes_on_or_is_refused_or_begun_again(do, tmp_path):
    stopped = three()
    stopped[1] = replace(stopped[1], stopped=True)
    assert do(stopped)[0] == "requeue"
    assert read_outcome(tmp_path)["reason"] == "stage second was asked to stop; start again to go on"
    with pytest.raises(UserError) as error:
        do(three(b="new"))
    assert str(error.value) == (
        f"stage second, unfinished in {tmp_path}/second, has other inputs now:\n  - text: 'b' there, 'new' now\n"
        f"give those values, or --from second to begin it again in a new directory; {tmp_path}/second stays as it is"
    )
    with pytest.raises(UserError, match=r"weights of first: .* there, 'what it is yet to leave' now"):
        do(three(a="other"))
    assert not (tmp_path / "first-2").exists(), "nothing begins where something is refused"
    assert do(three())[2] == "stage second: second: goes on"
    assert lines(tmp_path, "second") == ["a\nb\n"]


def test_from_begins_again_once_however_often_it_is_started(do, tmp_path):
    do(three())
    stopped = three()
    stopped[1] = replace(stopped[1], stopped=True)
    assert do(stopped, again="second")[2] == "stage second: second-2: begins again, second stays: --from second"
    for _ in range(2):
        assert do(stopped, again="second")[2] == "stage second: second-2: goes on", "as a queue would start it again"
    assert do(three(), again="second")[3] == "stage third: third: finished before, skipped"
    assert do(three(), again="second")[2] == "stage second: second-3: begins again, second-2 stays: --from second"
    said = do(three(), again="first")
    assert [line.split()[2] for line in said[1:]] == ["first-2:", "second-4:", "third-2:"]
    assert lines(tmp_path, "first", "second-3", "third") == ["a\n", "a\nb\n", "a\nc\n"]


def test_from_replaces_an_unfinished_stage_whose_inputs_changed(do, tmp_path):
    stopped = three()
    stopped[1] = replace(stopped[1], stopped=True)
    do(stopped)
    assert "second-2: begins again, second stays: --from second" in do(three(b="new"), again="second")[2]
    assert lines(tmp_path, "second-2") == ["a\nnew\n"]


def test_only(do, tmp_path):
    with pytest.raises(UserError, match="--only second: stage 'second' starts from 'first', which is not finished in"):
        do(three(), only=("second",))
    assert do(three(), only=("first",))[1:] == [
        "stage first: first: begins",
        "stage second: second: left as it is, not named by --only",
        "stage third: third: left as it is, not named by --only",
    ]
    assert read_outcome(tmp_path)["reason"] == "not looked at: second, third"
    assert do(three(a="other"), only=("third",))[3] == "stage third: third: begins", "whatever became of first's inputs"
    with pytest.raises(UserError, match=r"--only thrid: the chain has no such stage, .*; did you mean third\?"):
        do(three(), only=("thrid",))
    with pytest.raises(UserError, match="--from first --only second: the stage to begin again is not among those"):
        do(three(), again="first", only=("second",))


def test_what_was_left_is_what_is_taken(do, tmp_path):
    do(three()[:1])
    (tmp_path / "first" / "weights" / "line").write_text("x\n")
    with pytest.raises(UserError, match="first/weights/line is not the file that the stage left: its SHA-256 was"):
        do(three())
    (tmp_path / "first" / "weights" / "line").unlink()
    with pytest.raises(UserError, match=r"stage first, finished in .*, has lost what it left: weights/line: restore"):
        do(three())
    assert do(three(), again="first")[0] == "done"


def test_a_stage_that_others_made_is_neither_taken_nor_done_again(do, tmp_path):
    (tmp_path / "first").mkdir()
    write_outcome(tmp_path / "first", "done", 1, "by hand")
    with pytest.raises(UserError, match="first was begun outside of this chain, and what went into it is not known"):
        do(three())


def test_a_stage_without_inputs_that_others_made_is_not_taken_either(do, tmp_path):
    (tmp_path / "first").mkdir()
    write_outcome(tmp_path / "first", "done", 1, "by hand")
    with pytest.raises(UserError, match="first was begun outside of this chain, and what went into it is not known"):
        do([Written("first", "")])


def test_an_input_that_a_newer_version_has_is_asked_for(do, tmp_path):
    """It must not make what was trained stale by itself."""
    do(three()[:1])
    kept = json.loads((tmp_path / "first" / "provenance.json").read_text())
    (tmp_path / "first" / "provenance.json").write_text(json.dumps(kept | {"inputs": {}}))
    with pytest.raises(UserError) as error:
        do(three())
    assert str(error.value) == (
        f"stage first: {tmp_path}/first/provenance.json is of an older version, and does not say what these inputs "
        "were:\n  - text: None there, 'a' now\nadd them to its \"inputs\" with the values that they had, or --from "
        f"first to begin it again in a new directory; {tmp_path}/first stays as it is"
    )
    assert do(three(), again="first")[1] == "stage first: first-2: begins again, first stays: --from first"


def test_a_page_that_cannot_be_made_fails_no_finished_chain(alone, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("a defect")

    monkeypatch.setattr(report, "write", broken)
    assert chain.do_all(three(), tmp_path, chain.Options(), alone) == "done"
    assert "no page about it was written:\nTraceback (most recent call last):" in capsys.readouterr().out


def test_class_folders_are_told_by_their_names_and_sizes_wherever_they_lie(tmp_path, monkeypatch):
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "a.jpg").write_bytes(b"image")
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    inputs = [
        chain.Evaluate("judge", "first", options=chain.Evaluating(data=data)).inputs()
        for data in ("data", "copy/../copy", str(tmp_path / "data"))
    ]
    assert inputs[0] == inputs[1] == inputs[2]
    assert inputs[0].keys() == {"evaluate.split", "file of evaluate.real", "data of the class folders"}
    (tmp_path / "copy" / "cat" / "a.jpg").write_bytes(b"other image")
    assert chain.Evaluate("judge", "first", options=chain.Evaluating(data="copy")).inputs() != inputs[0]


def test_what_cannot_work_is_found_before_anything_begins(do, tmp_path):
    with pytest.raises(UserError, match="text #: no # can be written"):
        do(three(c="#"))
    assert not (tmp_path / "first").exists()
    (tmp_path / "chain.json").write_text('{"stages": 3}')
    with pytest.raises(UserError, match=r"chain\.json is not what a chain writes \(TypeError"):
        do(three())


def test_graphs_that_make_no_sense():
    first, second = chain.Train("a", Recipe(run_dir="a")), chain.Train("b", Recipe(run_dir="b"), "a")
    exporting = chain.Export("c", "b")
    chain.check_graph([first, second, exporting])
    for stages, message in (
        ([second, first], r"stage 'b' starts from 'a', but before it come only \[\]"),
        ([first, replace(second, name="a")], "two stages of the chain are called 'a' or work in 'b'"),
        ([first, replace(second, recipe=first.recipe)], "two stages of the chain are called 'b' or work in 'a'"),
        (
            [first, replace(second, weights="last")],
            r"stage 'a' has no weights 'last' to hand over: give one",
        ),
        ([first, second, exporting, replace(second, name="d", recipe=Recipe(run_dir="d"), start_from="c")], "hands no"),
        ([replace(first, recipe=Recipe(run_dir="a", ema_decay=0)), replace(second, weights="ema")], "keeps no average"),
    ):
        with pytest.raises(UserError, match=message):
            chain.check_graph(stages)
    with pytest.raises(UserError, match=r"stage 'b' starts from stage 'a', but its model\.start names x: only one can"):
        replace(second, recipe=Recipe(run_dir="b", model=Model(start="x")))


def test_a_model_that_cannot_take_the_weights_is_found_before_they_are_made(do, shards, tmp_path):
    small = Model(name="vittm_tiny", memory_ps=4, process_ps=8, embed_dim=24, depth=1, num_heads=3)
    recipe = Recipe(
        run_dir="a",
        data=Data(path=str(shards), global_batch=8),
        augment=Augment(image_size=16),
        schedule=Schedule(length="1 steps", warmup="0 steps"),
        model=small,
    )
    wider = replace(recipe, run_dir="b", model=replace(small, embed_dim=48))
    with pytest.raises(UserError) as error:
        do([chain.Train("a", recipe), chain.Train("b", wider, "a")])
    assert "stage b cannot start from what stage a leaves: it is a checkpoint of another model: " in str(error.value)
    assert not (tmp_path / "a").exists()
