"""The ustar format (POSIX.1-1988), as far as shards need it: regular files, no owner, no time, short names."""

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_NAME_BYTES = 100
_MAX_SIZE = 8**11 - 1


def member(name: str, data: bytes) -> bytes:
    """Header, content and padding of one member; ValueError for a name or content that a ustar header cannot state."""
    return b"".join((_header(name, len(data)), data, bytes(-len(data) % BLOCK)))


def member_name(header: bytes) -> str:
    """The name in a header block [512]."""
    return header[:MAX_NAME_BYTES].split(b"\0", 1)[0].decode("utf-8", "replace")


def _header(name: str, size: int) -> bytes:
    encoded = name.encode()
    if len(encoded) > MAX_NAME_BYTES or size > _MAX_SIZE:
        raise ValueError(f"member {name!r} of {size} bytes: a ustar name has {MAX_NAME_BYTES} bytes at most")
    fields = (
        encoded.ljust(MAX_NAME_BYTES, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0" * 2,  # uid, gid
        b"%011o\0" % size,
        b"%011o\0" % 0,  # mtime
        b" " * 8,  # the checksum counts itself as spaces
        b"0".ljust(101, b"\0"),  # a regular file; no link name
        b"ustar\x0000",  # magic, version; no owner, no device, no prefix
    )
    header = b"".join(fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
