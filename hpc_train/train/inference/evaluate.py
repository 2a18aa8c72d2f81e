"""`hpc-train evaluate`: the measures of a run's model on the rows of a file, or on the test of its task."""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from math import exp, isfinite
from pathlib import Path
from time import perf_counter

from hpc_train.core.energy_records import Energy
from hpc_train.core.errors import UserError
from hpc_train.core.inference_record import InferenceRecord, Work, write_record
from hpc_train.core.progress import StepProgress
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config, Data
from hpc_train.core.signals import TERMINATED, StopRequest
from hpc_train.train.comm.context import Context, joint
from hpc_train.train.comm.watchdog import open_watchdog
from hpc_train.train.evaluate import Measured, Watch, measure
from hpc_train.train.inference.meters import UseEnergy, make_folder
from hpc_train.train.inference.pass_over import Done, Tally, go_over
from hpc_train.train.inference.trained import ROW_KINDS, Log, Place, choose_step, load_model
from hpc_train.train.inference.use import PROGRAM, Request, open_use
from hpc_train.train.reduce.local import Local
from hpc_train.train.run.meta_writer import now
from hpc_train.train.setup import open_job


def evaluate(run: RunDir, config: Config, request: Request, context: Context, log: Log) -> tuple[InferenceRecord, int]:
    """Collective. The measures of the run's model on data.file, as the test after training makes them; returns the
    record, and the process's exit code: 0, or `TERMINATED` (143) after a stop on request, with the measures until then.

    Raises UserError.
    """
    if config.task.kind in ROW_KINDS:
        return _evaluate_rows(run, config, request, context, log)
    return _evaluate_task(run, config, request, context, log)


def _evaluate_rows(
    run: RunDir, config: Config, request: Request, context: Context, log: Log
) -> tuple[InferenceRecord, int]:
    use = open_use(run, config, request, True, context, log)
    use.warn_of_role(log)
    step = use.load(context.on_root(partial(choose_step, run, config, request.checkpoint)), context, log)
    rows = use.blocks.rows
    notes = _Notes(run, config, use.place, context, log)
    shown = StepProgress("evaluate", len(rows), config.run.progress, context.world.is_root, "rows")
    with (
        StopRequest() as stop,
        open_watchdog(context, config.run, log) as watchdog,
        closing(shown),
        notes.energy.recorded(),
    ):
        began_s = perf_counter()
        tally, stopped = go_over(use.work, Tally(rows.start), _keep_nothing, context, stop, watchdog, shown)
        seconds = perf_counter() - began_s
    found = InferenceRecord(
        kind="evaluate",
        run=str(run.path.resolve()),
        step=step,
        data=use.data,
        inputs=use.samples.name,
        rows=[rows.start, rows.stop],
        batch=use.blocks.batch,
        role=use.role,
        complete=not stopped,
        num_without=tally.num_without,
        measures=dict(tally.measures),
        num_measured=tally.num_measured,
        num_targets_missing=tally.num_targets_missing,
        program=PROGRAM,
    )
    record = notes.written(found, tally.row - rows.start, seconds)
    if stopped:
        log(f"Stopped by {stop.cause}: the measures are of the first {tally.row - rows.start:,} rows alone")
    return record, TERMINATED if stopped else 0


def _keep_nothing(done: list[Done], tally: Tally, is_last: bool) -> None:
    return


# ------------------------------------------------------------------------------------------------ other tasks


def _evaluate_task(
    run: RunDir, config: Config, request: Request, context: Context, log: Log
) -> tuple[InferenceRecord, int]:
    """A language model, an agent, or a task of the user's own: its own test, as after training."""
    rows = None if request.rows == (None, None) else request.rows
    ignored = {"--targets": request.targets, "--batch": request.batch, "--rows": rows}
    for option, value in ignored.items():
        if value is not None:
            raise joint(
                UserError(
                    f"{option} does not go with task.kind = '{config.task.kind}', which makes its own test",
                    f"Leave {option} out.",
                )
            )
    told = {"test_file": request.data, "test_inputs": request.inputs}
    data = config.data.model_copy(update={key: value for key, value in told.items() if value is not None})
    # Every rank computes with the whole model, whatever divided it while it was trained.
    strategy = "mpi" if context.world.size > 1 else "local"
    reduce = config.reduce.model_copy(update={"strategy": strategy, "stage": 1})
    whole = config.model_copy(update={"data": data, "reduce": reduce})
    with StopRequest() as stop, open_job(whole, context) as job:
        place = Place(job.device, 1, job.autocast, job.placements)
        choice = context.on_root(partial(choose_step, run, config, request.checkpoint))
        step = load_model(run, job.model, choice, place, context, log)
        log(f"Step {step} of {run.path}")
        notes = _Notes(run, config, place, context, log)
        shown = partial(StepProgress, "evaluate", mode=config.run.progress, is_root=context.world.is_root)
        with notes.energy.recorded():
            began_s = perf_counter()
            batches = job.task.test_batches(context.world)
            found = measure(job, Local(_NoControl()), batches, Watch(stop, lambda num: shown(num)))
            seconds = perf_counter() - began_s
    if not found.measures:
        raise joint(
            UserError(
                f"{run.path}: there is nothing to test on in {_where(data, config)}",
                "Name a file that has test samples: --data FILE.",
            )
        )
    record = InferenceRecord(
        kind="evaluate",
        run=str(run.path.resolve()),
        step=step,
        data=_where(data, config),
        inputs=str(data.test_inputs),
        rows=[0, found.num_done],
        batch=0,
        complete=found.is_whole,
        measures=_with_perplexity(config, found),
        num_measured=found.num_done,
        program=PROGRAM,
    )
    record = notes.written(record, found.num_done, seconds)
    return record, 0 if found.is_whole else TERMINATED


def _where(data: Data, config: Config) -> str:
    return data.test_file or data.file or data.dataset or config.rl.environment


def _with_perplexity(config: Config, found: Measured) -> dict[str, float | None]:
    """The exponential of a language model's loss a token, in nats: as many equally likely tokens to choose from."""
    loss = found.measures.get("loss")
    if "language" not in config.task.kind or loss is None or not isfinite(loss) or loss > 700:
        return dict(found.measures)
    return {"loss": loss, "perplexity": exp(loss), **found.measures}


@dataclass(frozen=True)
class _NoControl:
    """Nothing to stop or to save between steps: there are none."""

    stop = False
    save = False


# ------------------------------------------------------------------------------------------------ the record


class _Notes:
    """The record of an evaluation and its energy."""

    def __init__(self, run: RunDir, config: Config, place: Place, context: Context, log: Log) -> None:
        """Collective."""
        self._folder: Path | None = context.on_root(partial(make_folder, run, "evaluate", log))
        self.energy = UseEnergy(config.energy, place, self._folder, 1, context, log)
        self._place, self._context, self._began = place, context, now()

    def written(self, record: InferenceRecord, num_rows: int, seconds: float) -> InferenceRecord:
        """Collective, after the meters have stopped. The whole record."""
        used: Energy = self.energy.read()
        work = Work(
            began=self._began,
            ended=now(),
            num_ranks=self._context.world.size,
            hosts=sorted({place.host for place in self._place.placements}),
            device=self._place.name,
            num_rows=num_rows,
            seconds=seconds,
        )
        whole = replace(record, work=[work], joules=used.joules, energy_quality=used.quality, energy_source=used.source)
        if self._folder is not None:
            self._context.on_root(partial(write_record, self._folder, whole))
        return whole
