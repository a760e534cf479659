"""The ustar format (POSIX.1-1988), as far as shards need it: regular files, no owner, no time, short names."""

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_NAME_BYTES = 100
_MAX_SIZE = 8**11 - 1
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2  # mode; uid, gid
_AFTER_SIZE = b"\0" + b"00000000000\0"  # mtime
# A regular file; no link name; magic, version; no owner, no device, no prefix.
_REST = (b"0".ljust(101, b"\0") + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
_SUM = sum(_BEFORE_SIZE + _AFTER_SIZE + b" " * 8 + _REST)  # the checksum counts itself as spaces


def member(name: str, data: bytes) -> bytes:
    """Header, content and padding of one member; ValueError for a name or content that a ustar header cannot state."""
    return b"".join(parts(name, data))


def parts(name: str, data: bytes) -> tuple[bytes, bytes, bytes]:
    """What `member` joins."""
    return _header(name, len(data)), data, bytes(-len(data) % BLOCK)


def member_name(header: bytes) -> str:
    """The name in a header block [512]."""
    return header[:MAX_NAME_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")


def member_size(header: bytes) -> int:
    """The size of the content in a header block [512]; ValueError where it states none that is below 8 GiB."""
    return int(header[124:136].strip(b"\0 "), 8)


def _header(name: str, size: int) -> bytes:
    encoded, digits = name.encode(), b"%011o" % size
    if len(encoded) > MAX_NAME_BYTES or size > _MAX_SIZE:
        raise ValueError(f"member {name!r} of {size} bytes: a ustar name has {MAX_NAME_BYTES} bytes at most")
    checksum = b"%06o\0 " % (_SUM + sum(encoded) + sum(digits))
    return b"".join((encoded.ljust(MAX_NAME_BYTES, b"\0"), _BEFORE_SIZE, digits, _AFTER_SIZE, checksum, _REST))
