"""What a source finds becomes listings: their order, their keys, the rule of 21k-P, and a minival."""

from dataclasses import dataclass, field

import pytest

from shards.errors import UserError
from shards.sources.base import Entry, PRule, Rejected
from shards.writing.scan import Minival, scan


@dataclass(frozen=True)
class Findings:
    """A source that has found these."""

    findings: tuple[Entry | Rejected, ...]
    classes: tuple[str, ...] | None = None
    p_rule: PRule | None = None
    in_order: bool = field(default=False)

    def scan(self):
        return iter(self.findings)


def found(*paths, split="train", size=10):
    """Entries by `class/name`."""
    return tuple(
        Entry(split, *path.split("/"), "a.tar", offset=position, size=size) for position, path in enumerate(paths)
    )


@pytest.fixture
def scanned(tmp_path):
    """Scans findings; the listings by split, as `class/name`, and the rejected files by their reasons."""

    def run(*findings, minival=None, only=None, **source):
        number = len(list(tmp_path.iterdir()))
        work = tmp_path / str(number) / "work"
        work.mkdir(parents=True)

        def place(split):
            (work.parent / split).mkdir()
            return work.parent / split if only in (None, split) else None

        result = scan(Findings(findings, **source), work, place, minival, lambda: None)
        listings = {
            split: [
                f"{result.classes[image.label]}/{image.name}" for image in map(listing.__getitem__, range(len(listing)))
            ]
            for split, listing in result.listings.items()
        }
        return result, listings

    return run


def test_the_order_is_that_of_classes_and_names(scanned):
    result, listings = scanned(*found("b/2.jpg", "a/9.jpg", "b/10.jpg", "a/é.jpg", "b/1.jpg"))
    assert result.classes == ("a", "b")
    assert listings == {"train": ["a/9.jpg", "a/é.jpg", "b/1.jpg", "b/10.jpg", "b/2.jpg"]}
    first = result.listings["train"][0]
    assert (first.container, first.offset, first.size) == ("a.tar", 1, 10)


def test_the_hash_tells_names_and_sizes_and_not_places(scanned):
    here, there, larger, renamed = (
        scanned(*entries)[0].listings["train"].sha256
        for entries in (
            found("a/1.jpg", "b/2.jpg"),
            [entry._replace(container="b.tar", offset=99) for entry in found("b/2.jpg", "a/1.jpg")],
            found("a/1.jpg", "b/2.jpg", size=11),
            found("a/1.jpg", "b/3.jpg"),
        )
    )
    assert here == there
    assert len({here, larger, renamed}) == 3


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry("train", "a", "x.y.jpg", "t", 0, 1), "a dot, a slash or a control character in its key 'a_x.y'"),
        (Entry("train", "../a", "x.jpg", "t", 0, 1), "a dot, a slash or a control character in its key '../a_x'"),
        (Entry("train", "a", "x\n.jpg", "t", 0, 1), "a dot, a slash or a control character in its key 'a_x\\n'"),
        (Entry("train", "a", "\udcff.jpg", "t", 0, 1), "its name is not UTF-8"),
        (Entry("train", "a", "x" * 200 + ".jpg", "t", 0, 1), "its key has 202 bytes, more than 95"),
        (Entry("train", "a", "x.jpg", "t", 0, 10 * 2**30), "it has 10737418240 bytes, more than 268435456"),
    ],
)
def test_entries_that_cannot_be_samples(scanned, entry, reason):
    result, listings = scanned(*found("a/1.jpg"), entry, Rejected("train", "'link'", "it is a link"))
    assert listings == {"train": ["a/1.jpg"]}
    assert [file.reason for file in result.rejected] == [reason, "it is a link"]
    assert all(file.where.isprintable() for file in result.rejected)


def test_repeated_keys(scanned):
    """In a class, and between classes of which one name begins the other's; a split has keys of its own."""
    paths = ("a/1.jpg", "a/1.png", "a/a_1.jpg", "a/b_2.jpg", "a_b/2.jpg", "a_b/3.jpg")
    result, listings = scanned(*found(*paths), *found("a/1.jpg", split="val"))
    assert listings == {"train": ["a/1.jpg", "a/b_2.jpg", "a_b/3.jpg"], "val": ["a/1.jpg"]}
    assert [file.where for file in result.rejected] == ["'a/1.png'", "'a/a_1.jpg'", "'a_b/2.jpg'"]
    assert result.rejected[2].reason == "its key 'a_b_2' is that of another file of the split"


def test_the_rule_of_21k_p(scanned):
    """Classes of so many files by name; their first by sorted name validate. The small class is not a class."""
    large = [f"n2/n2_{number}.JPEG" for number in range(12)]
    small = [f"n1/n1_{number}.JPEG" for number in range(3)]
    result, listings = scanned(*found(*reversed(large), *small), p_rule=PRule(min_images=4, num_val=2))
    assert result.classes == ("n2",)
    assert listings["val"] == ["n2/n2_0.JPEG", "n2/n2_1.JPEG"]
    assert listings["train"] == sorted(large)[2:]


def test_no_class_large_enough(scanned):
    with pytest.raises(UserError, match=r"the largest of 1 classes has 1 images, and .* takes classes of 501 or more"):
        scanned(*found("a/1.jpg"), p_rule=PRule())


def test_classes_that_a_source_must_have(scanned):
    with pytest.raises(UserError, match=r"(?s)val.*missing.*b.*extra.*c"):
        scanned(*found("a/1.jpg", "b/2.jpg"), *found("a/1.jpg", "c/2.jpg", split="val"), classes=("a", "b"))
    result, _ = scanned(*found("a/1.jpg", "b/2.jpg"), classes=("b", "a"))
    assert result.classes == ("b", "a")
    assert [image.label for image in map(result.listings["train"].__getitem__, range(2))] == [0, 1]


def test_minival(scanned):
    """As many of every class, at most half of one; what is drawn follows the seed."""
    paths = [f"a/{number:03d}.jpg" for number in range(100)] + [f"b/{number:03d}.jpg" for number in range(4)]
    draws = []
    for seed in (0, 0, 1):
        _, listings = scanned(*found(*paths), minival=Minival(0.2, seed))
        assert len([name for name in listings["minival"] if name.startswith("a")]) == 10
        assert len([name for name in listings["minival"] if name.startswith("b")]) == 2
        assert sorted(listings["train"] + listings["minival"]) == paths
        draws.append(listings["minival"])
    assert draws[0] == draws[1] != draws[2]


def test_splits_without_a_place_are_named_and_not_listed(scanned):
    result, listings = scanned(*found("a/1.jpg"), *found("a/1.jpg", split="val"), only="val")
    assert listings == {"val": ["a/1.jpg"]}
    assert result.splits == ("train", "val")


def test_a_source_without_images(scanned):
    with pytest.raises(UserError, match=r"holds no images \(no file has their suffixes\); is it the right one\?"):
        scanned()
    with pytest.raises(UserError, match=r"holds no images \('x': it is a link\)"):
        scanned(Rejected("train", "'x'", "it is a link"))
