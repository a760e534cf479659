"""What the rates of tools/bench_input.py come to: tables, goals, and what the recipes need of a machine."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

from tools.benchmarks import LARGE, SMALL

PLAIN, RANDAUGMENT = "crop, flip", "RandAugment"
DECODE_ONLY, OURS, FAST, MARKERS = "decode-only", "ours", "ours-fast", "ours-fast-markers"
# Recipes read images as they were published, or squashed to 224x224.
RECIPES = {"pretrain_21k": (SMALL, RANDAUGMENT), "finetune_1k": (LARGE, RANDAUGMENT)}


class Run(NamedTuple):
    size: str
    augment: str
    loader: str


class Goal(NamedTuple):
    """`loader` shall do at least `ratio` times the images a second of CPU time that `against` does."""

    augment: str
    loader: str
    against: str
    ratio: float
    sizes: tuple[str, ...] = (LARGE, SMALL)


GOALS = (
    Goal(PLAIN, OURS, "webdataset", 1.25),
    Goal(PLAIN, OURS, "timm", 1.3),
    Goal(PLAIN, OURS, "ImageFolder", 1.0),
    Goal(PLAIN, FAST, DECODE_ONLY, 0.9),
    Goal(PLAIN, MARKERS, DECODE_ONLY, 1.1),
    Goal(PLAIN, FAST, "webdataset", 2.0, (SMALL,)),
    Goal(RANDAUGMENT, FAST, "ImageFolder", 2.0),
)

Rates = dict[Run, list[tuple[float, float]]]  # of each round: images a second of CPU time, and of wall time
Bytes = Mapping[str, Mapping[str, int]]  # of an image, by size and form of shards


def report(rates: Rates, num_bytes: Bytes, gpu_images: int) -> dict[str, Any]:
    """Prints the tables; what they say, for the record."""
    summary: dict[str, Any] = {
        "rates": summarise(rates),
        "goals": compare(rates),
        "needs": needs(rates, num_bytes, gpu_images),
    }
    _print_rates(summary["rates"])
    _print_goals(summary["goals"])
    _print_needs(summary["needs"], gpu_images)
    return summary


def summarise(rates: Rates) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """By size, augmentation and loader: the medians a second of CPU time ("cpu", from "lowest" to "highest") and of
    wall time, and the former over that of decode-only."""
    found: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for run, rounds in rates.items():
        cpu = [pair[0] for pair in rounds]
        numbers = {"cpu": _cpu(rates, run), "lowest": min(cpu), "highest": max(cpu)}
        numbers["wall"] = statistics.median(pair[1] for pair in rounds)
        rounded = {name: round(number, 1) for name, number in numbers.items()}
        rounded["of_decode_only"] = round(_cpu(rates, run) / _cpu(rates, Run(run.size, PLAIN, DECODE_ONLY)), 3)
        found.setdefault(run.size, {}).setdefault(run.augment, {})[run.loader] = rounded
    return found


def _cpu(rates: Rates, run: Run) -> float:
    return statistics.median(pair[0] for pair in rates[run])


def compare(rates: Rates) -> list[dict[str, Any]]:
    """The ratio of every goal whose loaders were run: of the medians, and from the lowest to the highest of a round."""
    found = []
    for goal in GOALS:
        for size in goal.sizes:
            ours, theirs = Run(size, goal.augment, goal.loader), Run(size, _augment_of(goal), goal.against)
            if ours in rates and theirs in rates:
                ratios = [mine[0] / other[0] for mine, other in zip(rates[ours], rates[theirs], strict=True)]
                ratio = _cpu(rates, ours) / _cpu(rates, theirs)
                numbers = {"ratio": ratio, "lowest": min(ratios), "highest": max(ratios), "goal": goal.ratio}
                described = {"size": size, "augment": goal.augment, "loader": goal.loader, "against": goal.against}
                found.append(described | {name: round(number, 3) for name, number in numbers.items()})
    return found


def _augment_of(goal: Goal) -> str:
    return PLAIN if goal.against == DECODE_ONLY else goal.augment


def needs(rates: Rates, num_bytes: Bytes, gpu_images: int) -> dict[str, dict[str, dict[str, float]]]:
    """By recipe and path, what a GPU that takes `gpu_images` a second needs: CPU cores, MB/s, and reads a second, of
    which every image is one."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for recipe, (size, augment) in RECIPES.items():
        for path in (OURS, FAST, MARKERS):
            if (run := Run(size, augment, path)) in rates:
                of_image = num_bytes[size]["markers" if path == MARKERS else "shards"]
                cores, megabytes = gpu_images / _cpu(rates, run), gpu_images * of_image / 1e6
                needed = {"cores": round(cores, 2), "MB/s": round(megabytes, 1), "IOPS": gpu_images}
                found.setdefault(recipe, {})[path] = needed
    return found


def _print_rates(summary: Mapping[str, Any]) -> None:
    columns = ("a CPU-second", "from", "to", "a second", "of decode-only")
    print(f"{'images':<42}", *(f"{column:>15}" for column in columns), sep="")
    for size, augments in summary.items():
        for augment, loaders in augments.items():
            for loader, numbers in sorted(loaders.items(), key=lambda item: -item[1]["cpu"]):
                *rates, share = (numbers[name] for name in ("cpu", "lowest", "highest", "wall", "of_decode_only"))
                cells = (*(f"{rate:>15,.0f}" for rate in rates), f"{share:>15.2f}")
                print(f"{size + ', ' + augment:<24}{loader:<18}", *cells, sep="")


def _print_goals(goals: list[dict[str, Any]]) -> None:
    for goal in goals:
        what = f"{goal['size']}, {goal['augment']}: {goal['loader']} against {goal['against']}"
        met = "met" if goal["ratio"] >= goal["goal"] else "missed"
        print(f"{what:<64}{goal['ratio']:.2f} ({goal['lowest']:.2f} to {goal['highest']:.2f}), {met}: {goal['goal']}")


def _print_needs(needed: Mapping[str, Any], gpu_images: int) -> None:
    for recipe, paths in needed.items():
        for path, numbers in paths.items():
            cells = ", ".join(f"{number:,} {unit}" for unit, number in numbers.items())
            print(f"{recipe + ', ' + path:<42}{cells} for a GPU of {gpu_images:,} images/s")
