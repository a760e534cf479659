"""Exports trained weights: `python tools/export.py RUN OUT` writes a directory that timm, and the hub, understand.

RUN is a finished run's directory, a file of its weights/, or a committed checkpoint (checkpoints/step-N) of DDP or
FSDP2. OUT gets model.safetensors, config.json and a model card. Every file is read back, and must compute the same.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.export import Formats, Licences, find, write
from pipeline.export.hub import push
from pipeline.export.source import UNKNOWN
from pipeline.record import WEIGHTS
from shards.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: exported; 2: it cannot be, and why."""
    options = _parser().parse_args(argv)
    licences = Licences(options.licence, options.data_licence, options.start_licence)
    try:
        source = find(options.source, options.weights)
        print(f"{source.path}: {source.variant} of {source.run_dir}", flush=True)
        formats = Formats(options.onnx, options.torch_export)
        for name, difference in write(source, options.out, formats, licences).items():
            print(f"{options.out / name}: logits within {difference:.1e} of the model's")
        if options.push:
            print(f"pushed: {push(options.out, options.push)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, metavar="RUN", help="a run's directory, a file of weights, or a checkpoint")
    add("out", type=Path, metavar="OUT", help="a new directory")
    add("--weights", choices=WEIGHTS, default="", help="default: ema, or model where no average was kept")
    add("--onnx", action="store_true", help="also model.onnx, compared by onnxruntime")
    add("--torch-export", action="store_true", help="also model.pt2, a program of torch.export")
    unknown = f"for the model card (default: {UNKNOWN})"
    add("--licence", default=UNKNOWN, metavar="TEXT", help=f"of these weights, best as the hub names it, {unknown}")
    add("--data-licence", default=UNKNOWN, metavar="TEXT", help=f"of the data they were trained on, {unknown}")
    add("--start-licence", default=UNKNOWN, metavar="TEXT", help=f"of the weights they started from, {unknown}")
    add("--push", metavar="OWNER/NAME", help="upload OUT to that repository of Hugging Face's hub, new or not")
    return parser


if __name__ == "__main__":
    sys.exit(main())
