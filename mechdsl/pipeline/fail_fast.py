"""`fail_fast`: expectations are decided as soon as all that they name has run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mechdsl.pipeline.run_options import RunOptions
from mechdsl.pipeline.waves import FileRun
from mechdsl.program import spec
from mechdsl.program.run_order import named_by
from mechdsl.results.experiment_result import (
    ExpectOutcome,
    ExperimentResult,
    LostExperiment,
    NotRun,
    Undecided,
)
from mechdsl.results.finish import lost_experiment, with_verdicts


class Verdicts:
    """The verdicts of a file whose experiments run one by one, until one ends the run."""

    def __init__(
        self, run: FileRun, experiments: Sequence[spec.Experiment], options: RunOptions
    ) -> None:
        """experiments: those that are reported, in the order of the file, each once."""
        self.run = run
        self.experiments = experiments
        self.ends = options.ends
        self.decided: dict[str, dict[int, ExpectOutcome]] = {}
        self.stopped = False

    def stop(self) -> bool:
        """Decide what can be decided by now; whether that ends the run. False without
        `fail_fast`."""
        if self.ends is None:
            return False
        for experiment in self.experiments:
            if experiment.name in self.run.lost:
                lost = lost_experiment(experiment, self.run.lost[experiment.name])
                self.decided[experiment.name] = dict(enumerate(lost.outcomes))
            elif experiment.name in self.run.results:
                self._decide(experiment)
            else:
                continue
            if self.ends(self.run.checked.source.name, experiment.name, self._of(experiment.name)):
                self.stopped = True
        return self.stopped

    def _decide(self, experiment: spec.Experiment) -> None:
        """Those of its expectations that could not be decided before."""
        known = self.decided.setdefault(experiment.name, {})
        waiting = self._waiting()
        labels = [measure.label for measure in experiment.measures]
        ready = [
            number
            for number, each in enumerate(experiment.expects)
            if number not in known and waiting.isdisjoint(named_by(each, labels))
        ]
        if experiment.statistics.verdicts != "none" and len(ready) < len(experiment.expects):
            return  # they are decided together
        asked = experiment.model_copy(
            update={"expects": tuple(experiment.expects[number] for number in ready)}
        )
        run = self.run
        found = with_verdicts(run.results[experiment.name], asked, run.results, run.lost)
        known.update(zip(ready, found.outcomes, strict=True))

    def _waiting(self) -> set[str]:
        """Experiments of the file that haven't run so far."""
        every = {each.name for each in self.run.checked.experiments}
        return every - self.run.results.keys() - self.run.lost.keys()

    def _of(self, name: str) -> tuple[ExpectOutcome, ...]:
        known = self.decided.get(name, {})
        return tuple(known[number] for number in sorted(known))

    def results(self) -> tuple[ExperimentResult, ...]:
        """What was found, with its verdicts."""
        run = self.run
        return tuple(
            replace(run.results[e.name], outcomes=self._of(e.name))
            if self.ends is not None
            else with_verdicts(run.results[e.name], e, run.results, run.lost)
            for e in self.experiments
            if e.name in run.results
        )

    def lost(self) -> tuple[LostExperiment, ...]:
        """What could not be computed."""
        lost = self.run.lost
        return tuple(lost_experiment(e, lost[e.name]) for e in self.experiments if e.name in lost)

    def not_run(self) -> tuple[NotRun, ...]:
        """What the verdict that ended the run has left out."""
        if not self.stopped:
            return ()
        waiting = self._waiting()
        left: list[NotRun] = []
        for experiment in self.experiments:
            known = self.decided.get(experiment.name, {})
            expects = tuple(
                Undecided(each.text, each.span.line)
                for number, each in enumerate(experiment.expects)
                if number not in known
            )
            if expects or experiment.name in waiting:
                left.append(NotRun(experiment.name, expects))
        return tuple(left)
