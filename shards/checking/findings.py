"""What a check of shards found: findings, their counts, and the report of all."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from shards.progress import Rates

WITHIN, ACROSS, IN_OTHER = "duplicate within a split", "duplicate across splits", "duplicate in OTHER"
# Whether these copies bear the same class decides what they are called.
OTHER_CLASS = ", of another class"
DUPLICATES = frozenset(kind + suffix for kind in (WITHIN, ACROSS, IN_OTHER) for suffix in ("", OTHER_CLASS))
# Checks whose findings need no remedy: shards are whole with them.
_WARNINGS = DUPLICATES | {"suffix", "left out", "empty classes"}


class Finding(NamedTuple):
    """What is wrong with a file or a sample; `check` says which check found it, and `key` is "" for a whole file."""

    check: str
    shard: str
    key: str
    reason: str


@dataclass
class Findings:
    """Findings, counted by check; of each check the first `max_listed` are kept."""

    max_listed: int
    listed: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, check: str, shard: str, key: str, reason: str) -> None:
        if not self.are_full(check):
            self.listed.append(Finding(check, shard, key, reason))
        self.counts[check] += 1

    def are_full(self, check: str) -> bool:
        """Whether the next finding of a check will be counted only."""
        return self.counts[check] >= self.max_listed

    def extend(self, others: "Findings") -> None:
        self.counts += others.counts
        self.listed += others.listed


@dataclass(frozen=True)
class SplitCounts:
    """What was read of a split; of the images a class has, the extremes and the median over all classes."""

    shards: int
    images: int
    bytes: int
    decoded: int
    fewest_images_a_class: int
    median_images_a_class: float
    most_images_a_class: int
    classes_without_images: int


@dataclass(frozen=True)
class Report:
    """The outcome of a check. `counts` are of all findings, by check; `findings` may be the first of them. `rates`: of
    images read, also of those in `against`; all else is the same for the same shards."""

    directory: str
    against: str
    splits: Mapping[str, SplitCounts]
    counts: Mapping[str, int]
    findings: tuple[Finding, ...]
    fail_on_duplicates: bool
    rates: Rates

    def is_error(self, check: str) -> bool:
        return check not in _WARNINGS or (self.fail_on_duplicates and check in DUPLICATES)

    @property
    def num_errors(self) -> int:
        return sum(count for check, count in self.counts.items() if self.is_error(check))

    @property
    def num_warnings(self) -> int:
        return sum(self.counts.values()) - self.num_errors

    def to_json(self) -> bytes:
        """The same bytes for the same findings."""
        report: dict[str, Any] = {
            "directory": self.directory,
            "against": self.against,
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "splits": {name: asdict(counts) for name, counts in self.splits.items()},
            "counts": self.counts,
            "findings": [
                {"level": "error" if self.is_error(finding.check) else "warning", **finding._asdict()}
                for finding in self.findings
            ],
        }
        return (json.dumps(report, sort_keys=True, indent=1) + "\n").encode()
