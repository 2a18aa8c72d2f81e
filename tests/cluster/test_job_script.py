"""Job scripts: what is rendered is what runs, whatever the values; and what a script does when ranks stop.

The scripts run here under bash with stand-ins for srun, squeue and scontrol; tests/slurm has the real ones.
"""

import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpc_train.cluster import submission
from hpc_train.cluster.job_script import render, template
from hpc_train.cluster.scheduler import Job
from hpc_train.cluster.site_profile import SiteProfile, load_site, time_limit_s
from hpc_train.cluster.slurm import Slurm
from hpc_train.core.config import load
from hpc_train.core.errors import UserError
from tests import jobs

SITES = sorted((jobs.ROOT / "slurm/sites").glob("*.toml"))
CONFIG = jobs.CONFIGS / "softmax-mnist.toml"
RECORD = """#!/bin/bash
printf '%s\\0' "$@" >"$RECORD/${0##*/}.argv"
env -0 >"$RECORD/${0##*/}.env"
pwd >"$RECORD/${0##*/}.pwd"
"""

# ---------------------------------------------------------------------------------------------- rendering

_INJECTIONS = [
    "$(touch $PWNED)",
    "`touch $PWNED`",
    "; touch $PWNED;",
    "& touch $PWNED &",
    "$HOME",
    "${IFS}",
    "%j",
    "-n",
]
_nasty = st.lists(
    st.sampled_from([*_INJECTIONS, *"'\"\\ &|>#*~!=[](){},aé日"]) | st.text(max_size=3), min_size=1, max_size=6
).map("".join)
_file_name = _nasty.filter(lambda text: "/" not in text and "\0" not in text and text not in ("", ".", ".."))
_printable = _nasty.filter(lambda text: text.isprintable() and text != "")


def stand_in(folder: Path, name: str, text: str = RECORD) -> Path:
    """A program of that name, first on the PATH that `run_script` gives."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
    return folder / name


def script_environment(folder: Path, **more: str) -> dict[str, str]:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2] $(touch $PWNED)", "SLURM_SUBMIT_DIR": str(folder)}
    own = {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RECORD": str(folder), "PWNED": str(folder / "pwned")}
    return {"HOME": str(folder), **slurm, **own, **more}


def run_script(folder: Path, script: str, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a job script as Slurm does: a copy of it, by bash, from any folder."""
    path = folder / "slurm_script"
    path.write_text(script)
    env = script_environment(folder, **more)
    return subprocess.run(["bash", path, *words], cwd="/", env=env, capture_output=True, text=True, timeout=60)


def argv(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.argv").read_text().split("\0")[:-1]


def env(folder: Path, name: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in (folder / f"{name}.env").read_text().split("\0")[:-1])


@given(
    bind=st.lists(_printable, max_size=3),
    modules=st.lists(_printable, max_size=3),
    values=st.lists(_printable, min_size=2, max_size=2),
    work=_file_name,
    run=_file_name,
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_reaches_a_shell_unquoted(
    bind: list[str], modules: list[str], values: list[str], work: str, run: str
) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            (folder / work).mkdir()
        except (OSError, UnicodeEncodeError):  # no file can be called that
            return
        stand_in(folder / "bin", "srun")
        stand_in(folder / "bin", "module")
        stand_in(folder / "venv/bin", "hpc-train")
        variables = {"UCX_TLS": values[0], "NCCL_IB_HCA": values[1]}
        venv = str(folder / "venv")
        site = SiteProfile(bind=bind, modules=modules, environment=variables, venv=venv, ranks_per_node=2)
        words = ("train", f"/runs/{run}/config.toml", "--resume", f"/runs/{run}")
        job = Job("job", 4, words, folder / work, folder / "run", "10")
        if not (work + run).isprintable():
            with pytest.raises(UserError, match="control character"):
                render(job, site)
            return
        script = render(job, site)
        assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20).returncode == 0
        done = run_script(folder, script)
        assert done.returncode == 0, done.stderr
        assert not (folder / "pwned").exists()
        assert argv(folder, "srun") == [
            *("--mpi=pmix", "--kill-on-bad-exit=1", "--unbuffered"), *bind, "hpc-train", *words
        ]  # fmt: skip
        assert {key: env(folder, "srun")[key] for key in variables} == variables
        assert (folder / "srun.pwd").read_text() == f"{folder / work}\n"
        assert not modules or argv(folder, "module") == ["load", *modules]


def header(script: str) -> list[str]:
    """The options that sbatch reads: its lines before the first that is no comment."""
    lines = script.splitlines()
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch would not see it"
    return [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]


def rendered(site: SiteProfile, **more: object) -> str:
    job = Job("job", 4, ("train", "/run/config.toml", "--resume", "/run"), Path("/work"), Path("/run"), "10", **more)  # type: ignore[arg-type]
    return render(job, site.model_copy(update={"venv": "/venv"}))


def test_the_rendered_script_is_the_plain_one_with_other_settings() -> None:
    """One source for both: sbatch slurm/train.sbatch runs what `hpc-train submit` renders."""
    texts = template(), rendered(SiteProfile())
    parts = [re.split(r"# ---- settings.*?\n|# ---- end of settings\n", text) for text in texts]
    assert [len(part) for part in parts] == [3, 3]
    assert parts[0][0] == parts[1][0] and parts[0][2] == parts[1][2]
    plain, ours = (dict(option.lstrip("-").partition("=")[::2] for option in header(text)) for text in
                   (template(), rendered(SiteProfile())))  # fmt: skip
    assert {"signal", "open-mode", "requeue", "job-name", "time", "output"} <= plain.keys() <= ours.keys()
    assert plain["signal"] == ours["signal"] and plain["open-mode"] == ours["open-mode"]


@pytest.mark.parametrize(
    ("keys", "asks"),
    [
        ({}, False),
        ({"cores_per_rank": 4}, True),
        ({"sbatch": ["--exclusive"]}, True),
        ({"sbatch": ["--cpus-per-task=4"]}, True),
        ({"sbatch": ["--comment=x"]}, False),
    ],
)
def test_a_profile_asks_for_cores_or_not(keys: dict[str, Any], asks: bool) -> None:
    assert SiteProfile(**keys).asks_for_cores is asks


def test_the_allocation_follows_the_profile() -> None:
    site = SiteProfile(
        ranks_per_node=3, cores_per_rank=8, gpus_per_node=3, partition="p", account="a", qos="q", constraint="[x|y]"
    )
    assert header(rendered(site)) == [
        *("--job-name=job", "--nodes=2", "--ntasks=4", "--ntasks-per-node=3", "--cpus-per-task=8", "--gpus-per-node=3"),
        *("--partition=p", "--account=a", "--qos=q", "--constraint=[x|y]", "--time=10", "--signal=USR2@120"),
        *("--output=job-%j.out", "--open-mode=append", "--requeue"),
    ]
    mpirun = rendered(SiteProfile(launcher="mpirun", bind=["--bind-to", "none"]))
    assert "--signal=B:USR2@120" in header(mpirun), "mpirun's ranks hear of it through the shell alone"
    assert "launcher=(mpirun -n 4 --bind-to none)" in mpirun
    assert "--acctg-freq=energy=1" in header(rendered(SiteProfile(energy="slurm")))
    assert "launcher=(env)\n" in rendered(SiteProfile(gpus_per_node=4), has_launcher=False)
    assert not any("gpus" in option for option in header(rendered(SiteProfile(gpus_per_node=4), has_launcher=False)))


# ---------------------------------------------------------------------------------------------- site profiles


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_shipped_profiles_load_and_render(path: Path) -> None:
    script = rendered(load_site(path.stem))
    assert subprocess.run(["bash", "-n"], input=script, text=True, timeout=20).returncode == 0


def test_every_key_is_explained() -> None:
    text = (jobs.ROOT / "slurm/README.md").read_text()
    assert [key for key in SiteProfile.model_fields if f"| `{key}` |" not in text] == []
    for path in SITES:
        assert f"`{path.name}`" in text


@pytest.mark.parametrize(
    "text, words",
    [
        ("partiton = 'x'", "mine.toml: unknown key partiton; did you mean partition?"),
        ("partition = 'a b'", "partition = 'a b': string should match pattern"),
        ('partition = "a\\n#SBATCH --x"', "partition = "),
        ("account = '-x'", "account = '-x'"),
        ("launcher = 'ssh'", "launcher = 'ssh': input should be 'srun' or 'mpirun'"),
        ("ranks_per_node = 0", "ranks_per_node = 0"),
        ("ranks_per_node = '4'", "ranks_per_node = '4'"),
        ("time = 'tomorrow'", "time: should be a time limit"),
        ("time = '0'", "time: should be more than nothing"),
        ("sbatch = ['--comment=a b']", "sbatch.0 = "),
        ("sbatch = ['exclusive']", "sbatch.0 = "),
        ("venv = 'here'", "venv = 'here' is not an absolute path"),
        ("venv = '$NO_SUCH_NAME/x'", "venv = '$NO_SUCH_NAME/x' is not an absolute path"),
        ('modules = ["a\\nb"]', "modules.0 = "),
        ("environment = { 'A B' = 'x' }", "environment.A B"),
        ("environment = { HF_TOKEN = 'x' }", "environment.HF_TOKEN looks like a secret"),
        ("environment = { A = 'https://me:pw@host' }", "environment.A looks like a secret"),
        ("environment = { OMP_NUM_THREADS = '4' }", "set cores_per_rank here"),
        ("time = ", "is not TOML"),
    ],
)
def test_a_wrong_profile_is_explained(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_site(str(path))
    assert words in str(caught.value)


def test_a_wrong_site_lists_the_right_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_site("infinibandgpu")
    assert "did you mean infiniband-gpu?" in str(caught.value) and "cray-slingshot, generic" in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        load_site(str(tmp_path / "none.toml"))


def test_paths_are_filled_in_from_the_submitting_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROJECT", "/projects/p1")
    path = tmp_path / "mine.toml"
    path.write_text("venv = '$PROJECT/venv'\nscratch = '/local'")
    assert load_site(str(path)).venv == "/projects/p1/venv"
    assert "export TMPDIR=/local\n" in rendered(load_site(str(path)))


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-12:30", 131400), ("0-0:0:5", 5)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert time_limit_s(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1-", "٣", "5 "])
def test_other_time_limits_are_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        SiteProfile(time=text)


# ---------------------------------------------------------------------------------------------- what a script does


def plain(
    folder: Path, launcher: str, *words: str, state: str = "RUNNING", scontrol: str = RECORD, **more: str
) -> tuple[int, str]:
    """Runs slurm/train.sbatch itself with a stand-in launcher: (exit code, output)."""
    stand_in(folder / "bin", "srun", launcher)
    stand_in(folder / "bin", "squeue", f"#!/bin/sh\necho {state}\n")
    stand_in(folder / "bin", "scontrol", scontrol)
    stand_in(folder / ".venv/bin", "hpc-train")
    done = run_script(folder, template(), *words, **more)
    return done.returncode, done.stdout + done.stderr


def test_the_plain_script_continues_what_it_began(tmp_path: Path) -> None:
    code, said = plain(tmp_path, RECORD, "a b.toml", "--set", "x=$(touch $PWNED)", SLURM_CPUS_PER_TASK="4")
    assert code == 0, said
    words = ["hpc-train", "train", "--resume", "auto", "a b.toml", "--set", "x=$(touch $PWNED)"]
    assert argv(tmp_path, "srun")[3:] == words
    ours = env(tmp_path, "srun")
    assert ours["SRUN_CPUS_PER_TASK"] == ours["OMP_NUM_THREADS"] == "4"
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "scontrol.argv").exists()


def test_the_plain_script_says_how_it_is_used(tmp_path: Path) -> None:
    code, said = plain(tmp_path, RECORD)
    assert code == 2 and "usage: sbatch" in said
    code, said = plain(tmp_path, RECORD, "x.toml", HPC_TRAIN_VENV="/no/venv")
    assert code != 0 and not (tmp_path / "srun.argv").exists()


@pytest.mark.parametrize(
    "code, state, requeues",
    [(75, "RUNNING", True), (75, "COMPLETING", False), (75, "", False), (0, "RUNNING", False), (1, "RUNNING", False)],
)
def test_only_a_stop_on_request_of_a_running_job_requeues(
    tmp_path: Path, code: int, state: str, requeues: bool
) -> None:
    ended, said = plain(tmp_path, f"#!/bin/sh\nexit {code}\n", "x.toml", state=state)
    assert ended == code
    assert (tmp_path / "scontrol.argv").exists() == requeues
    if requeues:
        assert argv(tmp_path, "scontrol") == ["requeue", "7"]
        assert "job 7: stopped with a checkpoint, requeued" in said
    elif code == 75:
        assert "submit this script again to continue" in said


def test_where_a_requeue_is_refused_the_code_stands(tmp_path: Path) -> None:
    """As for a job submitted with --no-requeue, or where there is no scontrol: it has not trained to its end."""
    for scontrol in ("#!/bin/sh\nexit 1\n", "#!/no/such/shell\n"):
        ended, said = plain(tmp_path, "#!/bin/sh\nexit 75\n", "x.toml", scontrol=scontrol)
        assert ended == 75 and "submit this script again to continue" in said, said


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_a_signal_to_the_shell_reaches_the_launcher(tmp_path: Path, name: str) -> None:
    """And the shell stays to see how the launcher ends, even where it takes its time and more signals come."""
    launcher = "#!/bin/bash\ntrap 'sleep 1; exit 75' USR2\n: >$RECORD/ready\nwhile :; do sleep 0.1; done\n"
    plain(tmp_path, "#!/bin/sh\nexit 0\n", "x.toml")  # writes the other stand-ins
    stand_in(tmp_path / "bin", "srun", launcher)
    job = subprocess.Popen(
        ["bash", tmp_path / "slurm_script", "x.toml"],
        env=script_environment(tmp_path),
        stdout=subprocess.PIPE,
        text=True,
    )
    began = monotonic()
    while not (tmp_path / "ready").exists():
        assert monotonic() - began < 30
        sleep(0.02)
    job.send_signal(getattr(signal, name))
    sleep(0.3)
    job.send_signal(signal.SIGTERM)
    said, _ = job.communicate(timeout=30)
    assert job.returncode == 75
    assert "requeued" in said and argv(tmp_path, "scontrol") == ["requeue", "7"]


# ---------------------------------------------------------------------------------------------- hpc-train submit

SBATCH = RECORD + "echo '41;cluster'\n"


def submit(folder: Path, *words: str, sbatch: str | None = SBATCH) -> jobs.Ended:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    if sbatch:
        stand_in(programs, "sbatch", sbatch)
    path = f"{programs}:{os.environ['PATH']}" if sbatch else str(programs)
    return jobs.run(0, "submit", CONFIG, "--nodes", 2, *words, cwd=folder, PATH=path, RECORD=str(folder))


def test_a_dry_run_prints_the_script_and_touches_nothing(tmp_path: Path) -> None:
    done = submit(tmp_path, "--dry-run", "--time", "2:00:00", "--set", "name=mine")
    assert done.code == 0, done.err
    assert {"--job-name=mine", "--nodes=2", "--time=2:00:00"} <= set(header(done.out))
    assert f"folder={tmp_path}\n" in done.out
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_what_is_submitted_stands_in_the_run_directory(tmp_path: Path) -> None:
    done = submit(tmp_path, "--json", "--set", "train.steps=7")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    run = tmp_path / told["run"]
    assert told["job"] == json.loads((run / "submitted.json").read_text())["job"] == "41"
    assert argv(tmp_path, "sbatch") == ["--parsable", "train.sbatch"]
    assert (tmp_path / "sbatch.pwd").read_text() == f"{run}\n", "its output goes where it is submitted from"
    assert "steps = 7 " in (run / "config.toml").read_text()
    assert f"words=(train {run}/config.toml --resume {run})\n" in (run / "train.sbatch").read_text()
    shown = submit(tmp_path)
    assert "Job 41: 2 ranks on 2 nodes" in shown.out and "squeue --start --job 41" in shown.out
    assert re.search(r"hpc-train report runs/softmax-mnist/\S+-np2", shown.out)
    assert "asks for no cores a rank" in shown.err and "cores_per_rank" in shown.err


def test_the_same_command_again_continues_what_ended_early(tmp_path: Path) -> None:
    first = json.loads(submit(tmp_path, "--json").out)
    stand_in(tmp_path / "bin", "squeue", "#!/bin/sh\necho 41\n")
    waits = submit(tmp_path, "--json")
    assert waits.code == 2 and f"{first['run']} is in the queue, or running, as job 41" in waits.err
    other = json.loads(submit(tmp_path, "--json", "--resume", "never").out)
    assert other["run"] != first["run"]
    stand_in(tmp_path / "bin", "squeue", "#!/bin/sh\necho 7\n")
    again = submit(tmp_path, "--json", sbatch=SBATCH.replace("41", "42"))
    assert json.loads(again.out) | {"job": "41"} == other, "the newest"
    assert json.loads((tmp_path / other["run"] / "submitted.json").read_text())["job"] == "42"
    assert f"{other['run']}/config.toml" in submit(tmp_path, "--dry-run").out
    for words in (("--set", "train.lr=0.1"), ("--nodes", "3")):
        done = submit(tmp_path, "--json", *words)
        assert json.loads(done.out)["run"] not in (first["run"], other["run"])
        assert "is not continued: it is unfinished, and train.lr = " in done.err and "A new run begins." in done.err
    refused = submit(tmp_path, sbatch="#!/bin/sh\nexit 1\n")
    assert refused.code == 2 and (tmp_path / other["run"] / "config.toml").exists(), "what was there stays"
    for run in (first["run"], other["run"]):
        (tmp_path / run / "summary.json").write_text("{}")
    assert json.loads(submit(tmp_path, "--json").out)["run"] not in (first["run"], other["run"]), "both are done"


@pytest.mark.parametrize(
    "words, sbatch, said",
    [
        (["--site", "nowhere"], SBATCH, "Shipped profiles: cray-slingshot, generic, infiniband-gpu"),
        (["--time", "soon"], SBATCH, "--time soon: should be a time limit"),
        (["--time", "2"], SBATCH, "not longer than the 120 s before its end"),
        (["--set", "train.global_batch=1"], SBATCH, "train.global_batch = 1 is smaller than the 2 ranks"),
        (["--set", "run.root=a%b"], SBATCH, "cannot have \\ or % in its path"),
        (["--set", "name=a b"], SBATCH, "name = 'a b'"),
        ([], None, "sbatch was not found"),
        ([], "#!/bin/sh\necho 'invalid partition specified: x' >&2\nexit 1\n", "invalid partition specified: x"),
    ],
)
def test_what_cannot_be_submitted_leaves_no_run(
    tmp_path: Path, words: list[str], sbatch: str | None, said: str
) -> None:
    done = submit(tmp_path, *words, sbatch=sbatch)
    assert done.code == 2 and said in done.err, done.err
    assert not list(tmp_path.glob("**/config.toml"))


# sbatch as a wrapper with a child of its own; the job is in the queue before it answers, if it answers
ACCEPTS_AND_HANGS = "#!/bin/bash\npwd >$RECORD/queue\nsleep 600\n"
QUEUE = "#!/bin/bash\n[ ! -e $RECORD/queue ] || echo 41 $(cat $RECORD/queue)\n"
SILENT = "#!/bin/sh\nexit 0\n"
BROKEN = "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2\nexit 1\n"


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Slurm's commands are those of the folder's bin/, and are waited for two seconds."""
    monkeypatch.setattr(submission, "_QUEUE_ANSWER_S", 2.0)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit_here() -> submission.Submitted:
    request = submission.Request(load(CONFIG, ("run.root=runs",)), load_site("generic"), 2)
    return submission.submit(Slurm(answer_s=2.0), request)


def test_a_job_that_slurm_took_without_an_answer_is_found_in_the_queue(impatient: Path) -> None:
    stand_in(impatient / "bin", "sbatch", ACCEPTS_AND_HANGS)
    stand_in(impatient / "bin", "squeue", QUEUE)
    began = monotonic()
    queued = submit_here()
    assert queued.job == "41" and monotonic() - began < 20
    assert json.loads((queued.run / "submitted.json").read_text())["job"] == "41"
    assert (queued.run / "config.toml").exists()


def test_a_refusal_in_a_sites_own_words_is_one(impatient: Path) -> None:
    words = "no hours are left: contact support, or send a mail"
    stand_in(impatient / "bin", "sbatch", f"#!/bin/sh\necho 'sbatch: error: {words}' >&2\nexit 1\n")
    with pytest.raises(UserError, match=words) as caught:
        submit_here()
    assert "Slurm may have" not in caught.value.what
    assert not list(impatient.glob("runs/softmax-mnist/*")), "nothing of it is left"


@pytest.mark.parametrize("squeue", [SILENT, BROKEN])
@pytest.mark.parametrize(
    "sbatch, said",
    [
        (ACCEPTS_AND_HANGS, "sbatch did not answer for 2 s"),
        ("#!/bin/sh\necho 'sbatch: error: Socket timed out on send/recv operation' >&2\nexit 1\n", "Socket timed out"),
        ("#!/bin/sh\nkill -9 $$\n", "killed by signal 9"),
        ("#!/bin/sh\necho 'see the news of 12 May'\n", "sbatch printed no job id: 'see the news of 12 May'"),
    ],
)
def test_what_slurm_may_have_taken_stays(impatient: Path, sbatch: str, said: str, squeue: str) -> None:
    """And the same command again does not queue it twice once the queue shows it."""
    stand_in(impatient / "bin", "sbatch", sbatch)
    stand_in(impatient / "bin", "squeue", squeue)
    with pytest.raises(UserError) as caught:
        submit_here()
    assert said in caught.value.what and "Slurm may have accepted the job all the same" in caught.value.what
    (config,) = impatient.glob("runs/softmax-mnist/*/config.toml")
    assert str(config.parent.relative_to(impatient)) in caught.value.what and "squeue --me" in caught.value.remedy
    stand_in(impatient / "bin", "squeue", f"#!/bin/sh\necho 7 /elsewhere\necho '41 {config.parent}'\n")
    with pytest.raises(UserError, match="is in the queue, or running, as job 41"):
        submit_here()
    stand_in(impatient / "bin", "squeue", SILENT)
    stand_in(impatient / "bin", "sbatch", SBATCH)
    assert impatient / submit_here().run == config.parent, "it was not taken, and goes on from there"


def test_ctrl_c_while_slurm_answers_keeps_the_job(tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "sbatch", ACCEPTS_AND_HANGS)
    stand_in(tmp_path / "bin", "squeue", QUEUE)
    env = jobs.environment(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", RECORD=str(tmp_path))
    words = jobs.command(0, "submit", CONFIG, "--nodes", 2)
    with subprocess.Popen(
        words, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as child:
        began = monotonic()
        while not (tmp_path / "queue").exists():
            assert monotonic() - began < 60 and child.poll() is None
            sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does
        out, err = child.communicate(timeout=30)
    assert child.returncode == 130 and out == "" and "Traceback" not in err
    assert "Slurm has the job: 41 is in the queue (scancel 41 removes it)" in err
    assert len(list(tmp_path.glob("runs/softmax-mnist/*/config.toml"))) == 1


@pytest.mark.thorough
def test_the_commands_of_its_readme_run_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(jobs.CONFIGS)
    stand_in(tmp_path / "bin", "sbatch", SBATCH)
    path = f"{tmp_path / 'bin'}:{jobs.HPC_TRAIN.parent}:{os.environ['PATH']}"
    env = jobs.environment(PATH=path, RECORD=str(tmp_path))
    text = (jobs.ROOT / "slurm/README.md").read_text()
    lines = [line[2:] for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ran = [shlex.split(line) for line in lines if line.startswith("hpc-train ")]
    for words in ran:
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"$ {words}\n{done.stdout}{done.stderr}"
    assert {words[1] for words in ran} == {"prepare", "submit", "scale"}
