"""The stages of a chain, done in order on every rank of a launch."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import report
from pipeline.backend import World
from pipeline.chain.decide import HANDED, Options, Plan, Step, check_output, decide
from pipeline.chain.records import describe_files, read_provenance, write_book, write_provenance
from pipeline.chain.stage import Stage
from pipeline.record import write_outcome
from shards.errors import UserError

PAGE = "report.html"


def do_all(stages: Sequence[Stage], root: Path, options: Options, world: World) -> str:
    """The outcome: "done", or "requeue" as soon as a stage is stopped. The chain's own outcome.json counts stages as
    its steps. Where a stage is to be tried out, all that are not are left, and nothing is noted.

    Raises UserError, before any stage begins, for what can be seen not to work in any of them.
    """
    dry = any(stage.dry_run for stage in stages)
    plan = world.on_main(lambda: settle(stages, root, options))
    by_name = {stage.name: stage for stage in stages}
    for stage in stages:
        if plan.steps[stage.name].action in ("run", "resume"):
            stage.check(world, by_name.get(stage.start_from))
    if not dry:
        world.on_main(lambda: write_book(root, stages, plan.book))
    chain = _Chain(stages, root, plan, world)
    outcome = chain.try_out() if dry else chain.work()
    if outcome == "done" and not dry:
        world.on_main(lambda: write_book(root, stages, replace(plan.book, again="")))
        world.on_main(lambda: write_page(root))
    return outcome


def write_page(root: Path) -> None:
    """The page about the chain. That a finished chain has none, for whatever reason, is no failure of it."""
    try:
        print(f"the page about it: {report.write([root], root / PAGE)}", flush=True)
    except UserError as error:
        print(f"no page about it was written: {error}", flush=True)
    except Exception:
        print(f"no page about it was written:\n{traceback.format_exc()}", flush=True)


def settle(stages: Sequence[Stage], root: Path, options: Options) -> Plan:
    """What is to be done. Raises UserError where a stage may not be gone on with."""
    plan = decide(stages, root, options)
    if refused := [step.reason for step in plan.steps.values() if step.action == "refuse"]:
        raise UserError("\n".join(refused))
    return plan


@dataclass(frozen=True)
class _Chain:
    stages: Sequence[Stage]
    root: Path
    plan: Plan
    world: World

    def work(self) -> str:
        finished = 0
        for stage in self.stages:
            step = self.plan.steps[stage.name]
            self._say(describe(stage, step, self.root))
            if step.action in ("run", "resume") and (outcome := self._do(stage, step)) != "done":
                self._conclude(outcome, finished, f"stage {stage.name} was asked to stop; start again to go on")
                return outcome
            finished += step.action != "leave"
        left = [name for name, step in self.plan.steps.items() if step.action == "leave"]
        self._conclude("done", finished, f"not looked at: {', '.join(left)}" if left else "every stage is finished")
        return "done"

    def try_out(self) -> str:
        """Dry runs of the stages that ask for one."""
        for stage in self.stages:
            step = self.plan.steps[stage.name]
            if not stage.dry_run:
                self._say(f"stage {stage.name}: no dry run of it was asked for")
                continue
            self._say(describe(stage, step, self.root))
            if step.action not in ("run", "resume"):
                continue
            start = self._start(stage)
            if start and not self.world.from_main(start.exists()):
                start = None
                self._say(f"stage {stage.name}: looked at without the weights that {stage.start_from} will leave")
            if (outcome := stage.work(self.root / step.directory, start, self.world)) != "done":
                return outcome
        return "done"

    def _do(self, stage: Stage, step: Step) -> str:
        directory, start = self.root / step.directory, self._start(stage)
        if step.action == "run":
            self.world.on_main(lambda: self._note_begin(stage, directory, start))
        outcome = stage.work(directory, start, self.world)
        if outcome == "done":
            self.world.on_main(lambda: self._note_end(stage, directory))
        return outcome

    def _note_begin(self, stage: Stage, directory: Path, start: Path | None) -> None:
        """provenance.json: what goes in, and what that was made of, as it is before any work."""
        inputs: dict[str, object] = stage.inputs()
        found = {"inputs": inputs, "stage": stage.name, "directory": str(directory.absolute()), **stage.sources()}
        if start:
            source = self._source_directory(stage)
            inputs[HANDED.format(stage.start_from)] = check_output(source, start)
            found["start"] = {"file": str(start), "made_by": read_provenance(source)}
        write_provenance(directory, found)

    def _note_end(self, stage: Stage, directory: Path) -> None:
        """And what came out."""
        outputs = describe_files(directory, stage.outputs(directory))
        write_provenance(directory, {**read_provenance(directory), "outputs": outputs})

    def _start(self, stage: Stage) -> Path | None:
        if not stage.start_from:
            return None
        source = next(other for other in self.stages if other.name == stage.start_from)
        return source.hands_over(self._source_directory(stage), stage.weights)

    def _source_directory(self, stage: Stage) -> Path:
        return self.root / self.plan.steps[stage.start_from].directory

    def _conclude(self, outcome: str, stages_done: int, reason: str) -> None:
        if self.world.is_main:
            write_outcome(self.root, outcome, stages_done, reason)

    def _say(self, message: str) -> None:
        if self.world.is_main:
            print(message, flush=True)


def describe(stage: Stage, step: Step, root: Path) -> str:
    """Where, what, and why."""
    said = f"left as it is, {step.reason}" if step.action == "leave" else step.reason
    return f"stage {stage.name}: {root / step.directory}: {said}"
