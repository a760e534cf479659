"""Tars of every format, whole, hostile and damaged: `tarfile` and GNU tar write them, `walk` must agree."""

import gzip
import io
import os
import subprocess
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import UserError
from shards.tars.walk import unsafe_path, walk

KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.DIRTYPE: "directory",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "link",
    tarfile.CHRTYPE: "other",
    tarfile.FIFOTYPE: "other",
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
GIB = 1 << 30


def member(name, data=b"", kind=tarfile.REGTYPE, **fields):
    """A TarInfo and its content."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_bytes(*members, layout="gnu", **options):
    """The tar of members, with its end mark."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[layout], **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name=b"a.jpg", size=b"00000000000", flag=b"0", magic=b"ustar\x0000", signed=False):
    """A header block by hand."""
    block = b"".join((name.ljust(100, b"\0"), bytes(24), size.ljust(12, b"\0"), bytes(12), b" " * 8, flag, bytes(100)))
    block = (block + magic).ljust(512, b"\0")
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in block)
    return block[:148] + b"%06o\0 " % total + block[156:]


def base_256(number):
    """GNU's size field."""
    return b"\x80" + number.to_bytes(11, "big")


def pax(records):
    """A pax header, and a member that it is for."""
    return header(size=b"%o" % len(records), flag=b"x") + records + bytes(-len(records) % 512) + header()


def walked(data, compressed=False):
    """(name, offset, size, kind, content) of every member."""
    plain = io.BytesIO(gzip.compress(data, 1) if compressed else data)
    with gzip.GzipFile(fileobj=plain) if compressed else plain as file:
        return [(*found, file.read(found.size)) for found in walk(file)]


def by_tarfile(data):
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8", errors="surrogateescape") as tar:
        return [
            (info.name, info.offset_data, len(content), KINDS[info.type], content)
            for info in tar
            for content in [tar.extractfile(info).read() if info.isreg() else b""]
        ]


PARTS = st.binary(min_size=1, max_size=40).map(lambda raw: raw.replace(b"/", b"_").replace(b"\0", b"_"))
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(lambda parts: b"/".join(parts).decode("utf-8", "surrogateescape"))
MEMBERS = st.lists(
    st.tuples(NAMES, st.binary(max_size=1200), st.sampled_from(sorted(KINDS)), NAMES, st.sampled_from([0, 1.5])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150)
@given(MEMBERS, st.sampled_from(sorted(FORMATS)), st.booleans(), st.booleans())
def test_any_archive_is_walked_as_tarfile_reads_it(members, layout, compressed, commented):
    if layout == "ustar":  # its names have 100 bytes at most, unless they can be cut at a slash
        members = [(name[:40], data, kind, target[:40], int(time)) for name, data, kind, target, time in members]
    data = tar_bytes(
        *(
            member(name, data if kind == tarfile.REGTYPE else b"", kind, linkname=target, mtime=time)
            for name, data, kind, target, time in members
        ),
        layout=layout,
        encoding="utf-8",
        errors="surrogateescape",
        pax_headers={"comment": "of all"} if commented else {},
    )
    assert walked(data, compressed) == by_tarfile(data)


def test_a_file_whose_name_ends_in_a_slash():
    """Only v7 says so of a directory; found by the test above, whose names of 40 characters may end so."""
    data = header(b"d/", size=b"1", flag=b"0") + b"x" + bytes(511) + bytes(1024)
    assert walked(data) == by_tarfile(data)


PARTED = tar_bytes(member("é" * 90, b"a" * 700), member("b.tar", b"b" * 300, mtime=0.5), layout="pax")
CHANGES = st.lists(st.tuples(st.integers(0, len(PARTED) // 512 - 1), st.integers(0, 511), st.binary(max_size=12)))


@settings(max_examples=300)
@given(CHANGES)
def test_any_damage_under_a_right_checksum_is_a_user_error_or_stays_inside(changes):
    data = bytearray(PARTED)
    for block, place, new in changes:
        start = block * 512
        data[start + place : start + min(512, place + len(new))] = new[: 512 - place]
        data[start + 148 : start + 156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    try:
        found = walked(bytes(data))
    except UserError:
        return
    assert all(offset + size <= len(data) and len(content) == size for _, offset, size, _, content in found)


def test_a_long_ustar_name_is_put_together():
    name = "d" * 120 + "/" + "n" * 90
    assert walked(tar_bytes(member(name, b"x"), layout="ustar"))[0][0] == name


@pytest.mark.parametrize("compressed", [False, True])
def test_a_tar_in_a_tar_is_walked_in_between(compressed):
    inner = tar_bytes(member("1.jpg", b"one"), member("2.jpg", b"two"))
    data = tar_bytes(member("a.tar", inner), member("b.tar", inner), member("c.txt", b"three"))
    plain = io.BytesIO(gzip.compress(data) if compressed else data)
    found = []
    with gzip.GzipFile(fileobj=plain) if compressed else plain as file:
        for outer in walk(file):
            found.append(outer.name)
            if outer.name == "a.tar":
                found += [one.name for one in walk(file, outer.offset + outer.size)]
            elif outer.name == "b.tar":  # left before its end
                one = next(walk(file, outer.offset + outer.size))
                found += [one.name, file.read(one.size)]
    assert found == ["a.tar", "1.jpg", "2.jpg", "b.tar", "1.jpg", b"one", "c.txt"]


def test_an_old_header_without_magic():
    data = header(b"d/", flag=b"\0", magic=b"") + header(b"d/a", b"3", b"\0", b"") + b"abc".ljust(512, b"\0")
    assert [found[:4] for found in walked(data)] == [("d", 512, 0, "directory"), ("d/a", 1024, 3, "file")]


def test_gnu_times_are_no_prefix():
    data = header(magic=b"ustar  \0".ljust(88, b"\0") + b"14600000000")
    assert walked(data)[0][0] == "a.jpg"


def test_a_checksum_of_signed_bytes():
    assert walked(header("é.jpg".encode(), signed=True))[0][0] == "é.jpg"


def test_a_hard_link_with_a_size_has_no_content():
    assert [found[:3] for found in walked(header(b"l", b"777", b"1") + header(b"b"))] == [("l", 512, 0), ("b", 1024, 0)]


@pytest.mark.parametrize("layout", ["gnu", "pax"])
def test_members_of_ten_gigabytes_are_stepped_over(tmp_path, layout):
    path = tmp_path / "big.tar"
    with open(path, "wb") as file:
        info, _ = member("big.bin")
        info.size = 10 * GIB
        file.write(info.tobuf(FORMATS[layout]))
        file.seek(10 * GIB, os.SEEK_CUR)
        file.write(tar_bytes(member("after.jpg", b"x")))
    with open(path, "rb", buffering=0) as file:
        assert [(found.name, found.size) for found in walk(file)] == [("big.bin", 10 * GIB), ("after.jpg", 1)]


@pytest.mark.parametrize("layout", ["gnu", "posix"])
def test_sparse_files_are_told_and_stepped_over(tmp_path, layout):
    with open(tmp_path / "holes.jpg", "wb") as file:
        for place in range(12):  # more than the header alone can list
            file.seek(place << 20)
            file.write(b"x" * 4096)
    (tmp_path / "z.jpg").write_bytes(b"after")
    command = ["tar", f"--format={layout}", "-cSf", "out.tar", "holes.jpg", "z.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = walked((tmp_path / "out.tar").read_bytes())
    assert [(name, kind) for name, _, _, kind, _ in found] == [("holes.jpg", "other"), ("z.jpg", "file")]
    assert found[1][4] == b"after"


@pytest.mark.parametrize("zeros", [0, 512, 1024, 10240])
@pytest.mark.parametrize("compressed", [False, True])
def test_an_end_mark_may_be_short_or_missing(zeros, compressed):
    assert [found[0] for found in walked(header() + header(b"b.jpg") + bytes(zeros), compressed)] == ["a.jpg", "b.jpg"]


def test_what_a_record_was_filled_up_with_is_not_looked_at():
    assert len(walked(header() + bytes(1024) + b"rest of the buffer" * 99)) == 1


SOUND = tar_bytes(member("a.jpg", b"a" * 700), member("b" * 200 + ".jpg", b"b" * 300))
ENDS = {1536: 1, 1536 + 512 * 4: 2}  # where a cut lies between members, and how many come before it
DAMAGED = {
    "no tar": (b"\xff\xd8" * 999, "byte 0.*checksum is wrong"),
    "an empty file": (b"", "byte 0.*expected a member, but there is none"),
    "a wrong checksum": (SOUND[:1536] + b"X" + SOUND[1537:], "byte 1536.*checksum is wrong"),
    "a claim of 10 GB": (header(size=base_256(10 * GIB)) + bytes(9), r"'a\.jpg' claims 10737418240 bytes, and 9 are"),
    "the largest claim": (header(size=b"\x80" + b"\xff" * 11), r"claims \d{20,} bytes, and 0 are left"),
    "a negative size": (header(size=b"\xff" * 12), "is no number of bytes"),
    "a size in letters": (header(size=b"many"), "expected a sound header: invalid literal"),
    "a vast pax header": (header(size=b"77777777777", flag=b"x"), "extended header claims 8589934591 bytes, more than"),
    "a vast long name": (header(size=b"77777777777", flag=b"L"), "extended header claims 8589934591 bytes, more than"),
    "a cut long name": (header(size=b"1000", flag=b"L") + b"n" * 99, "header claims 512 bytes, and 99 are left"),
    "a long name of none": (header(size=b"1", flag=b"L") + b"n".ljust(512, b"\0"), "a member, but there is none"),
    "a pax size in letters": (pax(b"12 size=ten\n"), "b'ten' is no number"),
    "a pax size too long": (pax(b"5013 size=" + b"1" * 5002 + b"\n"), "expected a sound header: Exceeds the limit"),
    "a pax record too long": (pax(b"99 path=ab\n"), "b'99 path=ab.*' is no record of a pax header"),
    "a pax record too short": (pax(b"2 path=ab\n"), "b'2 path=ab.*' is no record of a pax header"),
    "a pax record of digits": (pax(b"9" * 512), "is no record of a pax header"),
    "a cut sparse map": (header(flag=b"S", magic=b"ustar  ".ljust(225, b"\0") + b"\1"), "in the map of a sparse file"),
    "a second tar": (SOUND + SOUND, "expected the end behind a block of zeros, but more follows"),
    "a hole": (SOUND[:1536] + bytes(512) + SOUND[2048:], "expected the end behind a block of zeros, but more follows"),
    "a hole to the end": (SOUND[:1536] + bytes(2 << 20), "expected the end behind its end mark, but over 1048576"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damage_is_named(tmp_path, what):
    data, message = DAMAGED[what]
    path = tmp_path / "some.tar"
    path.write_bytes(data)
    with open(path, "rb", buffering=0) as file, pytest.raises(UserError, match=message) as caught:
        list(walk(file))
    assert "some.tar' is no tar or damaged at byte" in str(caught.value)
    assert str(caught.value).endswith("copy or download it again")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("cut", range(1, 1536 + 512 * 4, 150))
def test_a_tar_cut_anywhere_but_between_members(cut, compressed):
    with pytest.raises(UserError, match=r"is no tar or damaged at byte .*expected"):
        walked(SOUND[:cut], compressed)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("cut", ENDS)
def test_a_tar_cut_between_members_is_taken_as_whole(cut, compressed):
    assert len(walked(SOUND[:cut], compressed)) == ENDS[cut]


def test_a_tar_in_a_tar_that_claims_more_than_its_member():
    inner = header(b"1.jpg", b"%011o" % 4096)
    with io.BytesIO(tar_bytes(member("a.tar", inner), member("b.jpg", bytes(8192)))) as file:
        outer = next(walk(file))
        with pytest.raises(UserError, match=r"byte 512: .*member '1.jpg' claims 4096 bytes, and 0 are left"):
            list(walk(file, outer.offset + outer.size))


def test_a_tar_in_a_tar_that_ends_in_a_header():
    inner = header(b"1.jpg") + header(b"2.jpg")[:188]
    with io.BytesIO(tar_bytes(member("a.tar", inner), member("b.jpg", bytes(8192)))) as file:
        outer = next(walk(file))
        with pytest.raises(UserError, match=r"byte 1024: expected a header, but only 188 bytes are left"):
            list(walk(file, outer.offset + outer.size))


PACKED = gzip.compress(tar_bytes(member("a.jpg", os.urandom(5000)), member("b.jpg", os.urandom(5000))))


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.8, 0.9999])
def test_a_gzip_cut_anywhere(tmp_path, share):
    path = tmp_path / "some.tar.gz"
    path.write_bytes(PACKED[: max(3, int(len(PACKED) * share))])
    with gzip.open(path) as file, pytest.raises(UserError, match=r"some.tar.gz' is no tar or .*cannot read on: Compre"):
        list(walk(file))


@pytest.mark.parametrize(("place", "message"), [(-8, "CRC check failed"), (-4, "Incorrect length"), (20, "Error -3")])
def test_a_damaged_gzip(place, message):
    data = bytearray(PACKED)
    data[place : place + 3 or None] = b"\xff\xff\xff"
    with gzip.open(io.BytesIO(data)) as file, pytest.raises(UserError, match=rf"cannot read on: {message}"):
        list(walk(file))


@pytest.mark.parametrize("claim", [10 * GIB, 1 << 80])
def test_claims_allocate_nothing(claim):
    """Behind a bomb of 64 MiB of zeros, in a stream whose end nobody knows."""
    bomb = gzip.compress(header(size=base_256(64 << 20)) + bytes(64 << 20) + header(b"b", base_256(claim)), 1)
    tracemalloc.start()
    try:
        with (
            gzip.open(io.BytesIO(bomb)) as file,
            pytest.raises(UserError, match=r"ends at byte|claims \d+ bytes"),
        ):
            list(walk(file))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b..c/d", ""),
        ("./a", ""),
        ("/a", "an absolute path"),
        ("../a", "'..' in its path"),
        ("a/../b", "'..' in its path"),
        ("a/..", "'..' in its path"),
        ("a\0b", "a NUL in its name"),
    ],
)
def test_unsafe_paths(name, reason):
    assert unsafe_path(name) == reason
