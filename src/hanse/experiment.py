"""Run a rule on a federation, and go on with a run that was stopped."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from hanse.attacks import Attack
from hanse.codecs.base import Codec, identity
from hanse.config import Settings
from hanse.core.errors import DivergedError, PrivacyError, StalledError
from hanse.core.messages import Tensors
from hanse.core.samples import Samples
from hanse.data.task import Answer
from hanse.engines import Engine, local
from hanse.engines.estimate import drive
from hanse.engines.rounds import Rounds
from hanse.federation import Federation
from hanse.fleet.clock import NEVER, SECOND, Jobs
from hanse.methods.base import Method
from hanse.privacy import Privacy
from hanse.schedules.network import Schedule
from hanse.schedules.synchronous import synchronous
from hanse.topologies import consensus_distance
from hanse.track.folder import CLIENTS, Folder, worst_share
from hanse.track.metrics import Metrics
from hanse.track.run import Job, Record, Run
from hanse.track.status import Phases, Status

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 5.0
COHORT_LISTED = 256
"""Longest cohort written into the history client by client."""
JOBS_LISTED = 5000
"""Jobs of a run that are written into its history one by one."""
GAP_NODES = 2000
"""Most nodes for which the spectrum of the weights is computed; it takes a second."""
CLIENTS_LISTED = 200
"""Clients of whom it is written down when they were away."""


class Writer(Protocol):
    """Anything that wants every committed round: progress, TensorBoard, MLflow."""

    def write(self, record: Record) -> None:
        """Take one round."""
        ...

    def close(self) -> None:
        """No more rounds will come."""
        ...


def job_row(job: Jobs, at: int, used: bool) -> Job:
    """A job that ended at ``at``, for the history: client, version and its times in seconds, None for those that never came."""
    names = "sent", "received", "computed", "arrives"
    sent, received, computed, arrived = (None if job[n] >= NEVER or job[n] > at else int(job[n]) / SECOND for n in names)
    return [int(job["client"]), int(job["version"]), sent, received, computed, arrived, at / SECOND if used else None]


class Recorder:
    """Turns committed rounds into history, evaluations and checkpoints, and knows where a run is."""

    net: Rounds
    phases: Phases

    def __init__(
        self, result: Run, every: int, every_seconds: float | None, folder: Folder | None, writers: Sequence[Writer]
    ) -> None:
        self.result, self.every, self.every_seconds, self.folder, self.writers = result, every, every_seconds, folder, writers
        self.saved_at, self.saved_round = time.monotonic(), 0
        self.jobs = 0
        self.metrics: Metrics | None = None

    def watch(self, net: Rounds) -> None:
        """From now on, know where ``net`` is."""
        self.net, self.phases = net, Phases()
        net.on_phase = self.phases.turn

    def start(self, net: Rounds, resume: bool) -> None:
        """Begin the run folder; with ``resume`` bring ``net`` and the history to the checkpoint in it instead."""
        if self.folder is None:
            return
        if not resume:
            self.folder.write(self.result)
            return
        saved = self.folder.load()
        if saved is not None:
            net.restore(saved)
        self.result.history = self.folder.rewind(net.round)
        self.jobs = sum(len(record["jobs"]) for record in self.result.history)

    @property
    def name(self) -> str:
        """What the run is called where it is told about."""
        return self.result.method if self.folder is None else self.folder.path.resolve().name

    def tell(self) -> dict[str, Any]:
        """Where the run is; may be asked from another thread."""
        net, phases = self.net, self.phases
        return {
            "run": self.name,
            "round": net.round,
            "rounds": net.total_rounds,
            "now": net.now,
            "phase": phases.name,
            "since": phases.since,
            "spent": {**phases.spent},
            "bytes_down": net.clock.down,
            "bytes_up": net.clock.up,
            "failures": net.failures(),
            "engine": net.engine.short_name,
            "clients": [standing._asdict() for standing in net.report()],
            "metrics": "" if self.metrics is None else self.metrics.address,
        }

    def serve(self, where: str) -> Metrics:
        """Serve metrics there."""
        self.metrics = Metrics(where, self.name, self.tell)
        self.writers = [*self.writers, self.metrics]
        return self.metrics

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say in the run folder where the run is, until it ends and how it did."""
        net, status = self.net, None if self.folder is None else Status(self.folder, self.tell)
        log.info("%s after round %d of %d", "begins" if net.round == 0 else "goes on", net.round, net.total_rounds)
        state, why = "failed", ""
        try:
            yield
            state = "finished" if net.finished else "stopped"
        except (KeyboardInterrupt, SystemExit):
            state = "stopped"
            raise
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise
        finally:
            level = logging.ERROR if why else logging.INFO
            log.log(level, "%s after round %d of %d%s", state, net.round, net.total_rounds, why and f": {why}")
            if status is not None:
                status.end(state, why)

    def __call__(self, net: Rounds) -> None:
        due = net.finished or self._due(net)
        if due:
            self.phases.turn("evaluating")
        record = Record(
            round=net.round,
            seconds=net.now,
            bytes_down=net.clock.down,
            bytes_up=net.clock.up,
            loss=net.loss,
            metrics=evaluate(net) if due else {},
            cohort=net.cohort.tolist() if len(net.cohort) <= COHORT_LISTED else [],
            staleness=net.staleness,
            updates=net.updates,
            jobs=self._jobs(net),
        )
        if (epsilon := net.epsilon) is not None:
            record["epsilon"] = epsilon
        self.phases.turn("saving")
        self.result.history.append(record)
        if net.arrangement is not None and "arrangement" not in self.result.notes:
            self.result.notes["arrangement"] = net.engine.full()
            if net.mixing is not None and net.clients <= GAP_NODES:
                self.result.notes["spectral gap"] = f"{net.mixing.gap:.4g}, of the weights of the first exchange"
            if self.folder is not None:
                self.folder.describe(self.result)
        if self.folder is not None:
            self.folder.append(record)
            if net.finished or net.stopping or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self.save(net)
        self.phases.turn("stepping")
        for writer in self.writers:
            writer.write(record)

    def _due(self, net: Rounds) -> bool:
        if self.every_seconds is None:
            return self.every > 0 and net.round % self.every == 0
        before = self.result.history[-1]["seconds"] if self.result.history else 0.0
        return net.now // self.every_seconds > before // self.every_seconds

    def _jobs(self, net: Rounds) -> list[Job]:
        """The jobs that ended in this round, up to ``JOBS_LISTED`` in all."""
        ended, net.clock.ended = net.clock.ended, []
        if net.now == 0 or self.jobs >= JOBS_LISTED:
            return []
        listed = [job_row(job, at, used) for jobs, at, used in ended for job in jobs]
        self.jobs += len(listed)
        return listed

    def save(self, net: Rounds) -> None:
        """Write a checkpoint; raises ``DivergedError`` rather than save a model that is not finite."""
        if not bool(torch.isfinite(net.state["x"]).all()):
            raise DivergedError(f"the model of round {net.round} is not finite; lower lr or set clip")
        if self.folder is not None:
            self.folder.checkpoint(net.snapshot(), weights(net))
        self.saved_at, self.saved_round = time.monotonic(), net.round


def evaluate(net: Rounds) -> dict[str, float]:
    """Loss and metrics on the global test set, and mean, worst tenth and variance of each metric over the clients' test parts."""
    problem, split = net.problem, net.federation.split
    found: dict[str, float] = {}
    if not net.personal and len(split.test_x):
        x, buffers = net.model, net.state.get("buffers", problem.start_buffers)
        scores = problem.evaluate(x, buffers, split.test_x, split.test_y)
        if not math.isfinite(scores["loss"]):
            raise DivergedError(f"the test loss after round {net.round} is {scores['loss']}; lower lr or set clip")
        found = {("test_loss" if n == "loss" else n): v for n, v in scores.items()}
        if split.newcomers is not None:
            new = split.newcomers
            fresh = problem.evaluate(x, buffers, *new.take(torch.arange(int(new.offsets[0]), int(new.offsets[-1]))))
            found |= {f"newcomer_{n}": v for n, v in fresh.items() if n != "loss"}
        aim = None if net.adversaries is None else net.adversaries.attack.probe(split.test_x, split.test_y)
        if aim is not None:
            found |= {f"attack_{n}": v for n, v in problem.evaluate(x, buffers, *aim).items() if n != "loss"}
    if net.state["x"].dim() > 1:
        found["consensus"] = consensus_distance(net.state["x"][net.honest])
    if net.state["x"].dim() > 1 or net.method.own_model is not None:
        for name, values in per_node(net).items():
            found |= {f"node_{name}": float(values.mean()), f"node_{name}_worst10": worst_share(values)}
            found[f"node_{name}_variance"] = float(values.var(correction=0))
    for name, values in per_client(net).items():
        values[~net.honest] = torch.nan  # how liars fare is nobody's concern
        there = values[~torch.isnan(values)]
        if name in problem.metrics and len(there):
            found[f"client_{name}"] = float(there.mean())
            found[f"client_{name}_worst10"] = worst_share(values)
            found[f"client_{name}_variance"] = float(there.var(correction=0))
    return found


def per_node(net: Rounds) -> Tensors:
    """Metrics of every honest node's own model, or client's that has one, on the global test set."""
    problem, split = net.problem, net.federation.split
    honest = net.honest
    w, size = own_models(net)[honest], len(split.test_x)
    if not size:
        return {}
    buffers = net.kept.read(torch.arange(net.clients))["buffers"][honest] if "buffers" in net.kept.widths else problem.start_buffers
    everywhere = Samples(split.test_x, split.test_y, torch.arange(len(w) + 1) * size, torch.arange(size).repeat(len(w)))
    return {name: v for name, v in problem.evaluate_clients(w, buffers, everywhere).items() if name in problem.metrics}


def own_models(net: Rounds) -> Tensor:
    """The whole model of every client, ``[N, P]``: the shared part, each one's own among peers and where the rule has it keep one,
    and its private one.
    """
    kept, own = net.kept.read(torch.arange(net.clients)), net.method.own_model
    w = net.state["x"].expand(net.clients, -1) if own is None else kept[own]
    return torch.cat([w, kept["private"]], 1) if "private" in kept else w


def per_client(net: Rounds) -> Tensors:
    """Loss and metrics of every client's own model on its own test part, ``[clients]`` each; empty without test parts."""
    problem, test = net.problem, net.federation.split.test
    if not int(test.offsets[-1] - test.offsets[0]):
        return {}
    w, buffers = net.state["x"], net.state.get("buffers", problem.start_buffers)
    if net.personal or net.method.own_model is not None:
        kept, w = net.kept.read(torch.arange(net.clients)), own_models(net)
        buffers = kept.get("buffers", buffers)
        if "buffers" not in kept and buffers.dim() > 1 and net.samples.domains is not None:
            buffers = buffers[net.samples.domains]
    return problem.evaluate_clients(w, buffers, test)


def weights(net: Rounds) -> Tensors:
    """The global model as named tensors: parameters (private ones at their start), and averaged buffers (a row a domain).

    Among peers it is the mean of their models.
    """
    problem = net.problem
    named = problem.layout.views(torch.cat([net.model, problem.start[problem.shared :]]))
    if "buffers" in net.state:
        named |= problem.buffer_layout.views(net.state["buffers"])
    return {n: t.clone() for n, t in named.items()}


def run(
    federation: Federation,
    method: Method,
    schedule: Schedule | None = None,
    *,
    rounds: int = 100,
    seconds: float | None = None,
    codec: Codec | None = None,
    down: Codec | None = None,
    privacy: Sequence[Privacy] = (),
    attack: Attack | None = None,
    engine: Engine | None = None,
    seed: int | None = None,
    evaluate: int = 1,
    evaluate_seconds: float | None = None,
    out: Path | str | None = None,
    writers: Sequence[Writer] = (),
    resume: bool = False,
    metrics_port: str | None = None,
    on_start: Callable[[Any], None] = lambda net: None,
) -> Run:
    """Train ``method`` on ``federation`` for ``rounds`` rounds, or until virtual time has reached ``seconds``.

    ``evaluate``: every how many rounds (0: only after the last), or ``evaluate_seconds``: after how many virtual seconds. ``seed``
    (default the federation's) draws cohorts and batches. ``privacy``: what keeps clients private, at most one of a kind.
    ``attack``: what some of the clients do to the others. ``out``: a
    run folder to write; with ``resume`` the run goes on from the checkpoint in it. ``metrics_port``: where
    metrics are served while it runs, ``[host:]port``. ``on_start`` gets the network before the first
    round; setting its ``stopping`` ends the run after a round, in a state from which it can be resumed. Raises
    ``DivergedError`` when the training loss is not finite and ``PrivacyError`` when too few clients are left to hide each other,
    after saving the last good round.
    """
    schedule, codec, down, engine = schedule or synchronous(), codec or identity(), down or identity(), engine or local()
    seed = federation.seed if seed is None else seed
    folder = None if out is None else Folder(Path(out))
    parts = {"method": method, "schedule": schedule, "codec": codec, "down": down, "engine": engine}
    numbers = {"rounds": rounds, "seconds": seconds, "seed": seed, "evaluate": evaluate, "evaluate_seconds": evaluate_seconds}
    settings = federation.settings() | {name: part.full() for name, part in parts.items()}
    settings |= {name: str(value) for name, value in numbers.items() if value is not None}
    if privacy:
        settings["privacy"] = ", ".join(part.full() for part in privacy)
    if attack is not None:
        settings["attack"] = attack.full()
    if seed != federation.seed:
        settings["split_seed"] = str(federation.seed)
    Settings.read(None, settings | {"metrics_port": metrics_port})  # the same checks as for a file or the command line
    result = Run(type(method).__name__, seed, settings, [], {}, names=federation.split.names)
    recorder = Recorder(result, evaluate, evaluate_seconds, folder, writers)
    if folder is not None and resume:
        result.notes = folder.read().notes
        if "arrangement" in result.notes:
            engine = Engine.parse(result.notes["arrangement"])
    end = math.inf if seconds is None else seconds
    net = engine.network(
        federation,
        method,
        codec,
        down,
        seed=seed,
        rounds=rounds,
        seconds=end,
        privacy=privacy,
        attack=attack,
        schedule=schedule,
        on_commit=recorder,
    )
    recorder.watch(net)
    with nullcontext() if metrics_port is None else closing(recorder.serve(metrics_port)):
        recorder.start(net, resume and not schedule.replayed)
        on_start(net)
        with recorder.watched():
            _play(net, schedule, method, recorder)
            if net.letters:
                result.notes["messages"] = ", ".join(f"{n:,} {kind} ({size:,} bytes)" for kind, (n, size) in net.letters.items())
            result.weights, result.state, result.clients = weights(net), net.snapshot(), _clients(net, result)
            if net.finished:
                result.answers = _answers(federation, result)
            if folder is not None and net.finished:
                folder.save(result.clients, CLIENTS)
                folder.describe(result)
    return result


def _play(net: Rounds, schedule: Schedule, method: Method, recorder: Recorder) -> None:
    """The whole conversation; its last good round is saved, and the writers are closed, however it ends."""
    threads = torch.get_num_threads()
    try:
        drive(schedule.run(net, method))
        if recorder.folder is not None and net.round > recorder.saved_round:  # stopped after the round's own chance to save
            recorder.save(net)
    except (DivergedError, PrivacyError, StalledError):
        recorded = 0 < net.round == len(recorder.result.history)  # else the model of this round is what went wrong
        if recorder.folder is not None and recorded and net.take_back() and bool(torch.isfinite(net.state["x"]).all()):
            recorder.save(net)
        raise
    finally:
        net.close()
        torch.set_num_threads(threads)
        for writer in recorder.writers:
            writer.close()


def _answers(federation: Federation, result: Run) -> list[Answer]:
    """What the final model says."""
    problem, split = federation.problem, federation.split
    return federation.task.answers(problem, *problem.vectors(result.weights), split.test_x, split.test_y)


def _clients(net: Rounds, result: Run) -> Tensors:
    """What is written down of every client at the end of a run."""
    federation = net.federation
    found = {"samples": net.samples.counts(), "rounds": net.taken.long()}
    if federation.split.groups is not None:
        found["classes"] = federation.split.groups
    listed = {int(job[0]): None for record in result.history for job in record["jobs"] if job[0] is not None}
    if listed and not federation.fleet.trace.counts_rounds:
        asked = torch.tensor([*listed][:CLIENTS_LISTED])
        found["away"] = federation.fleet.trace.away(federation.population, asked, net.now)
    if net.traffic is not None:
        found |= {"sent": net.traffic[:, 0].clone(), "received": net.traffic[:, 1].clone()}
    if net.adversaries is not None:
        found["liars"] = net.adversaries.liars
    own = per_client(net)
    if own and net.problem.metrics:
        found["accuracy"] = own[next(iter(net.problem.metrics))]
    return found


def resume(folder: Path | str, federation: Federation | None = None, writers: Sequence[Writer] = ()) -> Run:
    """Go on with the run in ``folder`` to the result it would have had.

    ``federation`` is needed only for a run whose task is not known by name. Raises ``CheckpointError`` where there is no run, or
    its checkpoint is damaged or of another model.
    """
    path = Path(folder)
    settings = Settings.read(None, Folder(path).read().settings)
    return run_settings(settings, federation, out=path, writers=writers, resume=True)


def run_settings(settings: Settings, federation: Federation | None = None, **how: Any) -> Run:
    """The one run that ``settings`` describe; ``how`` are further arguments of ``run``."""
    (method,), (schedule,), (codec,), down, engine, privacy, attack = settings.parts()
    return run(
        federation or settings.federation(settings.seed[0]),
        method,
        schedule,
        rounds=settings.rounds,
        seconds=settings.seconds,
        codec=codec,
        down=down,
        privacy=privacy,
        attack=attack,
        engine=engine,
        seed=settings.seed[0],
        evaluate=settings.evaluate,
        evaluate_seconds=settings.evaluate_seconds,
        metrics_port=settings.metrics_port,
        **how,
    )
