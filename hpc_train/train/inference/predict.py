"""`hpc-train predict`: what a trained model predicts of each row of a file, top to bottom."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from hpc_train.core.inference_record import InferenceRecord, Work, write_record
from hpc_train.core.progress import StepProgress
from hpc_train.core.rundir import RunDir
from hpc_train.core.settings import Config
from hpc_train.core.signals import CONTINUE, StopRequest
from hpc_train.train.comm.context import Context
from hpc_train.train.comm.watchdog import open_watchdog
from hpc_train.train.data.hdf5_faults import data_paths
from hpc_train.train.inference.meters import UseEnergy, make_folder
from hpc_train.train.inference.output_file import (
    Asked,
    OutputFile,
    Progress,
    can_write_together,
    create,
    find_progress,
    locked,
    publish,
    require_free,
    write_note,
)
from hpc_train.train.inference.outputs import require_arrays
from hpc_train.train.inference.pass_over import Done, Tally, go_over
from hpc_train.train.inference.trained import Log, choose_step
from hpc_train.train.inference.use import PROGRAM, Request, Use, digest, open_use, state_of
from hpc_train.train.run.checkpoint.retention import checkpoints
from hpc_train.train.run.meta_writer import now

_NOTE_S = 2.0  # between notes of how far the output is: a killed job repeats no more than this


def predict(
    run: RunDir, config: Config, request: Request, out: Path, force: bool, context: Context, log: Log
) -> tuple[InferenceRecord, int]:
    """Collective. Writes the predictions of data.file to `out`; returns the record, and the process's exit code: 0, or
    `CONTINUE` (75) if it was stopped on request, after which the same call goes on from there.

    force: overwrites `out`. Raises UserError.
    """
    context.on_root(partial(require_arrays, config, run))
    context.on_root(lambda: require_free(out, _read_files(run, config, request), force))
    with locked(out, context, log) as confirm:
        return _predict(run, config, request, out, force, confirm, context, log)


def _read_files(run: RunDir, config: Config, request: Request) -> list[Path]:
    """What a prediction reads, and what its run keeps. Raises UserError if there is no such data file."""
    data = request.data or config.data.test_file or config.data.file
    read = data_paths(config.model_copy(update={"data": config.data.model_copy(update={"file": data})}))
    return [*read, run.config, run.meta, *checkpoints(run)]


def _predict(
    run: RunDir,
    config: Config,
    request: Request,
    out: Path,
    force: bool,
    confirm: Callable[[], None],
    context: Context,
    log: Log,
) -> tuple[InferenceRecord, int]:
    """Collective, while no other job writes `out`, which `confirm` makes sure of on rank 0."""
    # Its note of how far it is holds numbers alone: metrics that keep states are for `evaluate`.
    plain = config.model_copy(update={"task": config.task.model_copy(update={"metrics": []})})
    use = open_use(run, plain, request, False, context, log)
    use.warn_of_role(log)
    asked = context.on_root(partial(_asked, use))
    begun = context.on_root(partial(find_progress, out, asked, force))
    step = begun.step if begun else context.on_root(partial(choose_step, run, config, request.checkpoint))
    step = use.load(step, context, log)
    begun = begun or context.on_root(partial(_begin, use, asked, step, out, log))
    if begun.tally.row > use.blocks.rows.start:
        log(f"Continues at row {begun.tally.row:,}")
    folder = Path(begun.record) if begun.record else None
    energy = UseEnergy(config.energy, use.place, folder, len(begun.work) + 1, context, log)
    together = context.on_all(partial(can_write_together, context, log))
    shown = StepProgress("predict", len(use.blocks.rows), config.run.progress, context.world.is_root, "rows")
    with (
        StopRequest() as stop,
        OutputFile(out, use.meaning.columns, together, context) as output,
        open_watchdog(context, config.run, log) as watchdog,
        closing(shown),
    ):
        shown.begin(begun.tally.row - use.blocks.rows.start)
        notes = _Notes(begun, use, output, out, confirm, context)
        with energy.recorded():
            tally, stopped = go_over(use.work, begun.tally, notes.keep, context, stop, watchdog, shown)
    used = energy.read()
    record = replace(
        notes.record(complete=not stopped), joules=used.joules, energy_quality=used.quality, energy_source=used.source
    )

    def finish() -> None:
        confirm()
        if stopped:
            write_note(out, replace(begun, tally=tally, work=record.work))
        else:
            publish(out)
        if folder is not None:
            write_record(folder, record)

    context.on_root(finish)
    if stopped:
        log(f"Stopped by {stop.cause} after row {tally.row - 1:,}. The same command goes on from there.")
    return record, CONTINUE if stopped else 0


def _asked(use: Use) -> Asked:
    rows, files = use.blocks.rows, use.samples.files
    return Asked(
        run=str(use.run.path.resolve()),
        config=digest(use.config),
        data=str(Path(use.data).resolve()),
        data_state=state_of(list(files.paths)),
        inputs=use.samples.name,
        targets=use.samples.targets_name,
        rows=[rows.start, rows.stop],
        batch=use.blocks.batch,
    )


def _begin(use: Use, asked: Asked, step: int, out: Path, log: Log) -> Progress:
    """Makes the output and the note that it is empty. For one rank."""
    facts: dict[str, Any] = {
        "run": asked.run,
        "checkpoint_step": step,
        "config_digest": asked.config,
        "program": PROGRAM,
        "data": asked.data,
        "inputs": asked.inputs,
        "rows": asked.rows,
        "batch": asked.batch,
    }
    create(out, len(use.blocks.rows), use.meaning.columns, use.meaning.constants, facts)
    folder = make_folder(use.run, "predict", log)
    begun = Progress(asked, step, Tally(use.blocks.rows.start), None if folder is None else str(folder))
    write_note(out, begun)
    return begun


class _Notes:
    """Keeps the blocks of each round, and notes every few seconds how far the output is."""

    def __init__(
        self, begun: Progress, use: Use, output: OutputFile, out: Path, confirm: Callable[[], None], context: Context
    ) -> None:
        self._begun, self._use, self._output, self._out, self._context = begun, use, output, out, context
        self._confirm = confirm
        self._first = use.blocks.rows.start
        self._tally = begun.tally
        self._began, self._began_s = now(), perf_counter()
        self._seconds = 0.0
        self._noted_s = -inf  # the first round is noted at once

    def keep(self, done: list[Done], tally: Tally, is_last: bool) -> None:
        """Collective."""
        runs = [(block.begin, block.tally.row - block.begin) for block in done]
        self._output.write(self._first, runs, [block.predictions for block in done])
        if not self._context.on_root(lambda: is_last or monotonic() - self._noted_s > _NOTE_S):
            return
        self._output.sync()
        self._tally, self._seconds = tally, perf_counter() - self._began_s
        self._context.on_root(self._note)

    def _note(self) -> None:
        self._confirm()
        write_note(self._out, replace(self._begun, tally=self._tally, work=self._work(None)))
        self._noted_s = monotonic()

    def _work(self, ended: str | None) -> list[Work]:
        world, places = self._context.world, self._use.place.placements
        mine = Work(
            began=self._began,
            ended=ended,
            num_ranks=world.size,
            hosts=sorted({place.host for place in places}),
            device=self._use.place.name,
            num_rows=self._tally.row - self._begun.tally.row,
            seconds=self._seconds,
        )
        return [*self._begun.work, mine]

    def record(self, complete: bool) -> InferenceRecord:
        asked, tally = self._begun.asked, self._tally
        return InferenceRecord(
            kind="predict",
            run=asked.run,
            step=self._begun.step,
            data=asked.data,
            inputs=asked.inputs,
            rows=asked.rows,
            batch=asked.batch,
            work=self._work(now()),
            complete=complete,
            num_without=tally.num_without,
            measures=dict(tally.measures),
            num_measured=tally.num_measured,
            num_targets_missing=tally.num_targets_missing,
            output=str(self._out.resolve()),
            program=PROGRAM,
        )
