"""How many bytes of parameters and optimizer states a rank holds: FSDP2 and ZeRO-3 beside DDP.

Each strategy is launched on its own (torchrun, --processes ranks), and the model takes one step of AdamW in fp32. What
counts are the storages behind the tensors, padding included, each once; a figure is the largest rank's. ZeRO-3 shards
tensors of any size here (stage3_param_persistence_threshold 0, where ds_configs/zero3.json keeps small ones whole).

Prints a table, and appends a JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline.backend import Backend, World, start
from pipeline.trainer import leave
from tools.bench_checkpoint import make
from tools.benchmarks import ROOT, append, header

STRATEGIES = ("ddp", "fsdp", "zero3")
KINDS = ("parameters", "optimizer")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _options(arguments)
    if options.into:
        world = start(options.device)
        found = measure(world, options.model, options.image_size)
        if world.is_main:
            options.into.write_text(json.dumps(found))
        leave(0)
    record = header("sharding", "tools/bench_sharding.py", arguments, ("torch", "deepspeed"))
    record |= {"world": options.processes, "model": options.model}
    with tempfile.TemporaryDirectory() as directory:
        held = {strategy: _launch(strategy, options, Path(directory)) for strategy in STRATEGIES}
    record["summary"] = summary(held)
    for strategy, found in record["summary"].items():
        columns = "".join(f"{found[kind] / 1e6:>12.3f}" for kind in KINDS)
        print(f"{strategy:<8}{columns} MB of {' and '.join(KINDS)} a rank: {found['ratio']:.3f} of DDP's")
    append(record, options.output)
    return 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="vittm_base", metavar="NAME", help="of timm's registry (default: %(default)s)")
    add("--image-size", type=int, default=224, metavar="PX", help="default: %(default)s")
    add("--processes", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--output", type=Path, default=ROOT / "benchmarks/sharding.jsonl", metavar="FILE")
    add("--into", type=Path, help=argparse.SUPPRESS)  # in a rank of a launch: where its figures go
    options = parser.parse_args(arguments)
    if options.processes < 2:
        parser.error(f"--processes {options.processes}: at least 2, for one shares nothing")
    return options


def summary(held: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """The bytes of each strategy, and the ratio of their sum to DDP's."""
    whole = sum(held["ddp"].values())
    return {strategy: {**found, "ratio": round(sum(found.values()) / whole, 4)} for strategy, found in held.items()}


def measure(world: World, model: str, image_size: int) -> dict[str, int]:
    """Bytes of each kind, of the rank that holds the most of both; all ranks call it."""
    backend, _ = make(world, model, image_size)
    found = max(world.gather(bytes_held(backend)), key=lambda held: sum(held.values()))
    backend.close()
    return found


def bytes_held(backend: Backend) -> dict[str, int]:
    """Of this rank. The pieces that the optimizer updates are parameters too, where they are copies (fp32 masters)."""
    states = (value for state in backend.optimizer.state.values() for value in state.values())
    pieces = (shard.tensor for shard in backend.shards())
    return {
        "parameters": _num_bytes([*_kept(backend.module.parameters()), *pieces]),
        "optimizer": _num_bytes(_kept(value for value in states if isinstance(value, Tensor))),
    }


def _kept(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """What this rank keeps of them: its shard, and under ZeRO-3 its partition beside a tensor that is empty."""
    for tensor in tensors:
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
        if hasattr(tensor, "ds_tensor"):
            yield tensor.ds_tensor


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _launch(strategy: str, options: argparse.Namespace, directory: Path) -> dict[str, int]:
    into = directory / f"{strategy}.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    given = ["--model", options.model, "--image-size", str(options.image_size), "--device", options.device]
    command = [*launcher, str(ROOT / "tools/bench_sharding.py"), *given, "--into", str(into)]
    subprocess.run(command, cwd=ROOT, env=os.environ | _environment(strategy, directory), check=True)
    return json.loads(into.read_text())


def _environment(strategy: str, directory: Path) -> dict[str, str]:
    """What a launch file would set."""
    if strategy != "zero3":
        return {"ACCELERATE_USE_FSDP": "true"} if strategy == "fsdp" else {}
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = directory / "config.json"
    path.write_text(json.dumps(config))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}


if __name__ == "__main__":
    sys.exit(main())
