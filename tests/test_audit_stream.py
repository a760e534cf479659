"""tools/audit_stream.py: what ranks would see, whatever serves them, and every way in which it may not be exact."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import ranks
import torch

from pipeline.data.batch import Batch, Replaced
from pipeline.data.replay import IdReader, Replay
from shards.engine import open_engine
from shards.index import Index
from shards.keyed import id_hash
from shards.layout import Layout
from shards.plan import Plan, WindowShuffle
from shards.reader import BadSample, Reader
from shards.tars.in_place import ForeignOptions, index_in_place
from tools import audit_stream

SIZE, BATCH, SEED = 80, 24, 7  # 3 steps, and a tail of 8


@pytest.fixture
def audit(capsys):
    """audit(data, *options) -> exit code, lines of stdout, stderr; in this process unless workers are asked for."""

    def call(data, *options):
        arguments = ["--seed", SEED, "--global-batch", BATCH, "--workers", 0, *options]
        code = audit_stream.main([str(data), *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


@pytest.fixture
def copied(shards, tmp_path) -> Index:
    """The shards, to be damaged."""
    return Index.load(shutil.copytree(shards, tmp_path / "copied"))


def keys_of(lines):
    """(step, rank, key) of the lines that --keys prints."""
    return [(int(step), int(rank), key) for step, rank, key in (line.split(" ") for line in lines if line[0].isdigit())]


def words_of(lines):
    return [line for line in lines if not line[0].isdigit()]


def planned(data, batch=BATCH, epoch=0, shuffle=None):
    """The keys of the epoch's global batches, from plan and reader alone."""
    index = Index.load(data)
    arguments = [SIZE, index.fingerprint("train"), SEED, batch]
    plan, reader = Plan(*arguments, *([shuffle] if shuffle else [])), Reader(index, "train")
    return [[reader.key(sample) for sample in plan.ids(epoch, step)] for step in range(plan.batches_per_epoch)]


def place(index, sample):
    """Shard path, and offset and size of the sample's image in it."""
    row = index.offsets("train")[sample]
    ends = np.cumsum([shard.num_samples for shard in index.split("train").shards])
    name = index.split("train").shards[np.searchsorted(ends, sample, side="right")].name
    return index.root / name, int(row["offset"]), int(row["size"])


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


# --- what it prints


def test_the_command(shards):
    command = [
        sys.executable,
        "tools/audit_stream.py",
        str(shards),
        "--split",
        "train",
        "--world",
        "4",
        "--workers",
        "2",
    ]
    command += ["--global-batch", "24", "--seed", "7", "--epoch", "0", "--keys"]
    done = subprocess.run(command, cwd=ranks.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = planned(shards)
    rows = [(step, place // 6, key) for step in range(3) for place, key in enumerate(expected[step])]
    assert keys_of(done.stdout.splitlines()) == rows
    fingerprint = Index.load(shards).fingerprint("train")
    whole = f"{id_hash(np.arange(SIZE)):016x}"
    assert words_of(done.stdout.splitlines()) == [
        f"plan: 80 samples of split train, fingerprint {fingerprint}, seed 7, epoch 0: 3 global batches of 24, on 4 "
        "ranks x 1 micro-batches",
        "shuffle: global, a permutation of the split",
        "epoch: 72 samples planned, 8 in the dropped tail, 0 duplicates, 0 missing",
        f"hash: {whole} of the epoch's ids, {whole} of the index's",
        "replay: 3 steps, 72 samples planned - 0 quarantined + 0 substitutes = 72 delivered",
        "bad: 0 different samples, 0 allowed",
        "exact: nothing is wrong",
    ]
    told = r"replaying: 72/72 images, \d+ images/s, 0 s left\n"  # and before it, where that takes long, how far it is
    assert re.fullmatch(rf"(replaying: \d+/72 images, \d+ images/s, .* left\n)*{told}", done.stderr)


@pytest.mark.parametrize(
    "options",
    [("--world", 8), ("--world", 2, "--accumulation", 3), ("--workers", 2), ("--world", 5, "--accumulation", 2)],
)
@pytest.mark.parametrize("shuffle", ["global", "window"])
def test_ranks_and_workers_change_nothing(audit, shards, options, shuffle):
    alone = keys_of(audit(shards, "--keys", "--shuffle", shuffle, "--window", 5)[1])
    code, lines, _ = audit(shards, "--keys", "--shuffle", shuffle, "--window", 5, *options)
    assert code == 0
    assert [(step, key) for step, _, key in keys_of(lines)] == [(step, key) for step, _, key in alone]
    assert len(keys_of(lines)) == 72


def test_a_lost_rank_changes_who_sees_a_sample_and_nothing_else(audit, shards):
    """From 4 ranks to 3: 16 samples are 4 x 4, then 6 + 6 + 4, in micro-batches of 2 or 4."""
    found = {}
    for world, uneven in ((1, ""), (4, ""), (3, " of 2 or 4 samples (DDP and FSDP2 alone)")):
        options = ("--global-batch", 16, "--world", world, "--accumulation", 2, "--mixing", "--keys")
        code, lines, _ = audit(shards, *options)
        assert (code, lines[-1]) == (0, "exact: nothing is wrong")
        assert lines[0].endswith(f"on {world} ranks x 2 micro-batches{uneven}")
        found[world] = keys_of(lines)
    assert len(found[1]) == SIZE
    assert len({tuple((step, key) for step, _, key in lines) for lines in found.values()}) == 1
    shares = {
        world: [[rank for step, rank, _ in found[world] if step == 4].count(rank) for rank in range(world)]
        for world in found
    }
    assert shares == {1: [16], 4: [4, 4, 4, 4], 3: [6, 6, 4]}


def test_a_late_start_goes_on_where_the_epoch_is(audit, shards):
    whole, late = (audit(shards, "--keys", "--epoch", 3, *late) for late in ((), ("--start-step", 2)))
    assert late[0] == 0
    assert keys_of(late[1]) == [line for line in keys_of(whole[1]) if line[0] == 2]
    assert [key for *_, key in keys_of(late[1])] == planned(shards, epoch=3)[2]
    (hashed,) = [line for line in late[1] if line.startswith("hash: ")]
    assert hashed in whole[1]
    assert "epoch: 72 samples planned, 8 in the dropped tail, 0 duplicates, 0 missing" in late[1]
    assert "replay: 1 steps, 24 samples planned - 0 quarantined + 0 substitutes = 24 delivered" in late[1]


def test_a_window_shuffle_is_described(audit, shards):
    options = ("--shuffle", "window", "--runs", 4, "--window", 10)
    code, lines, _ = audit(shards, *options, "--keys")
    assert code == 0
    sizes = tuple(shard.num_samples for shard in Index.load(shards).split("train").shards)
    expected = planned(shards, shuffle=WindowShuffle(sizes, 4, 10))
    assert [key for *_, key in keys_of(lines)] == [key for batch in expected for key in batch]
    assert words_of(lines)[1] == "shuffle: window, 4 runs of 20 samples, windows of about 10"
    assert re.fullmatch(
        r"mixing: neighbours in storage come \d+ samples apart in the median; in a global shuffle 23",
        words_of(lines)[2],
    )
    assert words_of(lines)[3] == "shards: a global batch draws on 3 to 3 of 3, in the first 3 batches"
    assert "shuffle: window, 24 runs of 3 samples, windows of about 2,048" in audit(shards, "--shuffle", "window")[1]


def test_the_plan_alone_reads_no_shard(audit, copied):
    for shard in copied.split("train").shards:
        (copied.root / shard.name).write_bytes(bytes(shard.num_bytes))
    code, lines, err = audit(copied.root, "--plan-only", "--start-step", 2)
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in lines] == ["plan", "shuffle", "epoch", "hash", "exact"]


def test_keys_from_elsewhere_stay_on_their_line(audit, tmp_path):
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, data in (("0\n1 a.jpg", b"-"), ("0\n1 a.cls", b"0"), ("é b.jpg", b"-"), ("é b.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with open_engine("local", 1) as engine:
        index_in_place(tmp_path, ForeignOptions(), engine, lambda images, num_bytes: None)
    code, lines, _ = audit(tmp_path, "--global-batch", 2, "--no-decode", "--keys")
    assert code == 0
    assert sorted(line for line in lines if line[0].isdigit()) == [r"0 0 0\n1 a", "0 0 é b"]


def test_a_reader_that_has_had_enough(shards, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert audit_stream.main([str(shards), "--global-batch", "8", "--plan-only"]) == 141
    assert capsys.readouterr().err == ""


# --- what the user may do wrong


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--world", 0), "--world 0: it must be 1 or more"),
        (("--workers", -1), "--workers -1: it must be 0 or more"),
        (("--epoch", -1), "--epoch -1: it must be 0 or more"),
        (("--start-step", -1), "--start-step -1: it must be 0 or more"),
        (("--start-step", 3), "past the end: an epoch of 80 samples has 3 steps of 24; give one from 0 to 2"),
        (("--world", 13), "its 12 pairs of samples are too few for a pair in each of 13 micro-batches: set the global"),
        (("--world", 2, "--global-batch", 25), "Set the global batch to 24 or 26, or run on 1 or 5 ranks."),
        (("--world", 8, "--mixing", "--accumulation", 2), "run on 6 ranks at most, or take 1 micro-batches at most."),
        (("--global-batch", 0), "a global batch of 0 does not cut evenly"),
        (("--global-batch", 96), "a global batch of 96 cannot be drawn from a split of 80 samples"),
        (("--shuffle", "window", "--runs", 5), "a window shuffle of 5 runs"),
        (("--shuffle", "window", "--window", 0), "a window of 0 samples"),
        (("--max-bad", "few"), "a budget of bad samples of 'few'"),
        (("--split", "tran"), "no split 'tran'"),
    ],
)
def test_mistakes(audit, shards, options, text):
    code, lines, err = audit(shards, *options)
    assert (code, lines) == (2, [])
    assert re.fullmatch(r"error: [^\n]+\n", err)
    assert text in err


def test_keys_of_a_plan_are_refused(shards):
    with pytest.raises(SystemExit, match="2"):
        audit_stream.main([str(shards), "--plan-only", "--keys"])


# --- bad bytes


def test_a_truncated_tar(audit, copied):
    path, offset, _ = place(copied, 40)
    os.truncate(path, offset)
    code, lines, err = audit(copied.root)
    assert (code, lines) == (2, [])
    assert f"shard {path} has {offset} bytes and the manifest says " in err
    assert "it was cut short or replaced" in err


def test_a_missing_shard(audit, copied):
    path, _, _ = place(copied, 40)
    path.unlink()
    code, lines, err = audit(copied.root)
    assert (code, lines) == (2, [])
    assert f"shard {path} of split 'train' is missing" in err


def test_an_index_of_another_dataset(audit, copied, tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for name in ("a.jpg", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    with open_engine("local", 1) as engine:
        index_in_place(tmp_path, ForeignOptions(), engine, lambda images, num_bytes: None)
    for name in ("index.json", "train.offsets.npy"):
        shutil.copy(tmp_path / name, copied.root)
    code, lines, err = audit(copied.root)
    assert (code, lines) == (2, [])
    assert re.search(r"train-000000.tar has \d+ bytes and the manifest says 10240: it was cut short or replaced", err)


def test_offsets_of_another_dataset(audit, copied):
    """As many, so that they pass for its own until the first image is read."""
    rows = np.array(copied.offsets("train"))
    rows["offset"] += 512
    np.save(copied.root / "train.offsets.npy", rows)
    code, lines, err = audit(copied.root)
    assert code == 1
    assert "replaying: 0/72 images" in err
    (text,) = [line for line in lines if line.startswith("wrong: ")]
    assert re.match(r"wrong: sample \d+ and 16 substitutes of it are bad: most of the split is unreadable", text)
    assert "the shard is not the indexed one" in text


def damage_jpeg(index):
    """Flips bits of two images, so that they do not decode."""
    for sample in (60, 70):
        path, offset, _ = place(index, sample)
        data = path.read_bytes()[offset : offset + 20]
        overwrite(path, offset, bytes(byte ^ 0x10 for byte in data))
    return {60, 70}


def cut_and_fill(index):
    """A download that was cut short, in a file that has its full size."""
    path, offset, _ = place(index, 52)
    size = path.stat().st_size
    os.truncate(path, offset)
    os.truncate(path, size)
    return {52, 53}


def replace_shard(index):
    """By another of the same size."""
    path, _, _ = place(index, 79)
    path.write_bytes(path.read_bytes()[512:] + bytes(512))
    return set(range(54, 80))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_jpeg, r"c\d_\d+: ValueError: cannot decode an image from \d+ bytes: .+"),
        (cut_and_fill, r"(c\d_\d+)?: ValueError: .+"),
        (replace_shard, r".*: ValueError: no file of \d+ bytes begins at offset \d+: the shard is not the indexed one"),
    ],
)
def test_bad_bytes(audit, copied, damage, reason):
    clean = keys_of(audit(copied.root, "--keys")[1])
    bad = damage(copied)
    code, lines, _ = audit(copied.root, "--keys", "--world", 2, "--max-bad", "40%")
    assert (code, lines[-1]) == (0, "exact: nothing is wrong")
    plan = Plan(SIZE, copied.fingerprint("train"), SEED, BATCH)
    is_bad = [sample in bad for step in range(3) for sample in plan.ids(0, step)]
    is_replaced = [was[2] != now[2] for was, now in zip(clean, keys_of(lines), strict=True)]
    assert is_replaced == is_bad
    num = sum(is_bad)
    assert f"replay: 3 steps, 72 samples planned - {num} quarantined + {num} substitutes = 72 delivered" in lines
    first, *listed = [line for line in lines if line.startswith("bad: ")]
    (num_bad,) = re.fullmatch(r"bad: (\d+) different samples, 32 allowed", first).groups()
    assert num <= int(num_bad) <= len(bad)
    assert len(listed) == min(int(num_bad), 20)
    assert all(re.fullmatch(f"bad: {place(copied, max(bad))[0]}: {reason}", line) for line in listed)
    code, lines, _ = audit(copied.root)
    assert code == 1
    assert len([line for line in lines if line.startswith("bad: ")]) == 1 + len(listed)
    assert lines[-1] == f"wrong: {num_bad} samples are bad, and --max-bad 0.01% allows 0"


def test_bad_bytes_that_nobody_decodes(audit, copied):
    damage_jpeg(copied)
    assert audit(copied.root, "--no-decode")[0] == 0
    assert audit(copied.root)[0] == 1


# --- a stream that is not exact


class Twice:
    """A shuffle that draws sample 5 for position 6 too, and one past the end for position 0."""

    def check(self, plan):
        pass

    def order(self, plan, epoch):
        return lambda positions: np.where(positions == 6, 5, np.where(positions == 0, plan.num_samples, positions))

    def state(self):
        return {}


def test_a_plan_that_is_not_a_permutation(capsys):
    (wrong,) = audit_stream.audit_plan(Plan(80, "", 0, 24, Twice()), 0)
    out = capsys.readouterr().out
    assert "epoch: 72 samples planned, 8 in the dropped tail, 1 duplicates, 2 missing\n" in out
    assert wrong.startswith("epoch 0 has 1 duplicates, 2 samples missing and 1 that the split has not; its hash is ")


PLAN = Plan(SIZE, "", SEED, BATCH)


@pytest.fixture
def replay(shards) -> Replay:
    return Replay(IdReader(Index.load(shards), "train"), PLAN, Layout(BATCH, world=2))


def test_ranks_that_ask_for_the_same(replay):
    ids = PLAN.ids(0, 1)
    replay.note_step(1, [ids[:12], ids[12:]], epoch=0)
    assert replay.wrong == []
    replay.note_step(1, [ids[:12], ids[:12]], epoch=0)
    replay.note_step(2, [ids[:12], ids[12:]], epoch=0)
    assert replay.wrong == [
        "step 1: 12 of 24 samples come again in it",
        "step 1: what the ranks ask for is not the plan's global batch",
        "step 2: what the ranks ask for is not the plan's global batch",
    ]


def batch(planned, came, *bad):
    images = torch.tensor(came).reshape(-1, 1, 1, 1)
    replaced = tuple(Replaced(BadSample("a.tar", "k", sample, "train", "why"), other) for sample, other in bad)
    return Batch(images, torch.zeros(len(came)), torch.tensor(planned), 0, 0, 0, replaced)


def test_samples_that_nobody_planned(replay):
    replay.note(batch([4, 5, 6, 7], [4, 9, 6, 9], (5, 9), (7, 3), (3, 9), (7, 9)))
    assert replay.wrong == []
    assert (replay.num_quarantined, replay.num_substitutes, replay.num_delivered) == (2, 2, 4)
    assert replay.bad.keys() == {3, 5, 7}
    replay.note(batch([4, 5], [5, 4]))
    replay.note(batch([4], [4], (4, 8)))
    assert replay.wrong == [
        f"sample {came} came where {planned} was planned, and is not its substitute"
        for came, planned in ((5, 4), (4, 5), (4, 4))
    ]
