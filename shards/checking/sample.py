"""What must hold of a sample of a shard: its fields, its label, its json and its image."""

from collections.abc import Iterator, Sequence

from shards.images import BadImage, ImageHeader, read_header
from shards.raster import check_decodes
from shards.tars.samples import TarSample, Unfit, shown

NO_LABEL = -1
_TYPES = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}

Problem = tuple[str, str]  # the check that found it, and the reason


def label_of(sample: TarSample, num_classes: int) -> int:
    """The label that its cls, else its json, states; NO_LABEL where that is not in [0, num_classes)."""
    try:
        label = sample.label()
    except Unfit:
        return NO_LABEL
    return label if label < num_classes else NO_LABEL


def check_image(sample: TarSample, data: bytes, decode: bool) -> tuple[ImageHeader | None, list[Problem]]:
    """Header of the image `data`, where it can be read, and what is wrong with it; `decode`: with any pixel of it."""
    try:
        header = read_header(data)
    except BadImage as error:
        return None, [("decode", str(error))]
    problems = []
    if header.field != _TYPES[name := sample.image()[0]]:
        problems.append(("suffix", f"the field is {name}, and the image is {header.field}"))
    if decode:
        try:
            check_decodes(data, header.field)
        except ValueError as error:
            problems.append(("decode", f"it cannot be decoded ({error})"))
    return header, problems


def check_texts(sample: TarSample, header: ImageHeader | None, classes: Sequence[str], label: int) -> Iterator[Problem]:
    """What is wrong with cls and json of a sample that make_shards wrote; `header` None: sizes are not compared."""
    if missing := [name for name in ("cls", "json") if name not in sample.texts]:
        yield "sample", f"it has no {' and no '.join(missing)}"
    if len(sample.images) > 1:
        yield "sample", f"it has {len(sample.images)} images: {', '.join(sample.images)}"
    if "cls" in sample.texts and label == NO_LABEL:
        yield "label", f"its cls holds {shown(sample.texts['cls'])}, and labels are in [0, {len(classes)})"
    if "json" in sample.texts:
        class_name = None if label == NO_LABEL else classes[label]
        yield from (("json", reason) for reason in _json_problems(sample, header, class_name))


def check_class(sample: TarSample, classes: Sequence[str], label: int) -> Iterator[Problem]:
    """What is wrong with the label that the index has for a sample that make_shards did not write."""
    try:
        named = sample.class_name()
    except Unfit as error:
        yield "json", str(error)
        return
    if not 0 <= label < len(classes):
        yield "label", f"the index has label {label}, and labels are in [0, {len(classes)})"
    elif named and named != classes[label]:
        yield "json", f"it names the class {shown(named)}, and the index has {classes[label]!a}"


def _json_problems(sample: TarSample, header: ImageHeader | None, class_name: str | None) -> Iterator[str]:
    try:
        meta = sample.meta
    except Unfit as error:
        yield str(error)
        return
    if not isinstance(meta.get("filename"), str):
        yield f"its filename is {shown(meta.get('filename'))}, no text"
    expected = {"wnid": class_name, "width": header and header.width, "height": header and header.height}
    for name, value in expected.items():
        if value is not None and meta.get(name) != value:
            whose = "its label's class" if name == "wnid" else "the image's"
            yield f"its {name} is {shown(meta.get(name))}, and {whose} is {value!a}"
