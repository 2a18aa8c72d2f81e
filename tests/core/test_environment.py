"""What of the environment ends up in a run directory: by name, and never a secret."""

import json
from pathlib import Path
from time import monotonic

import pytest

from hpc_train.core.environment import recorded, recorded_slurm
from hpc_train.core.redaction import REDACTED, command, looks_secret, message, without_secrets
from tests import jobs


def test_what_decides_speed_is_kept_and_nothing_else() -> None:
    kept = {
        "OMP_NUM_THREADS": "4",
        "UCX_NET_DEVICES": "mlx5_0:1",
        "NCCL_SOCKET_IFNAME": "hsn0",
        "FI_PROVIDER": "cxi",
        "HOROVOD_CYCLE_TIME": "0.1",
        "OMPI_MCA_pml": "ucx",
        "MPICH_OFI_NIC_POLICY": "NUMA",
        "PSM2_DEVICES": "self,shm,hfi",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    others = {"HOME": "/home/me", "AWS_PROFILE": "x", "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_hnp_uri": "tcp://1"}
    assert recorded({**others, **kept}) == kept
    assert list(recorded(kept)) == sorted(kept)


@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("HOROVOD_SECRET_KEY", "hunter2", REDACTED),
        ("UCX_AUTH_TOKEN", "hunter2", REDACTED),
        ("FI_OPX_PASSWORD", "hunter2", REDACTED),
        ("NCCL_API_KEY", "hunter2", REDACTED),
        ("NCCL_CONF_FILE", "https://me:hunter2@host/nccl.conf", f"https://{REDACTED}@host/nccl.conf"),
        ("NCCL_CONF_FILE", "https://hunter2@host/x ftp://a:hunter2@b", f"https://{REDACTED}@host/x ftp://{REDACTED}@b"),
        ("OMPI_MCA_btl", "^openib", "^openib"),
        ("UCX_TLS", "rc,sm,self", "rc,sm,self"),
    ],
)
def test_secrets_are_named_and_not_shown(name: str, value: str, shown: str) -> None:
    assert recorded({name: value}) == {name: shown}
    assert looks_secret(name, value) == (shown != value)


PASSED = [
    ["--tokens", "300", "--max-tokens=4", "--tokenizer", "bpe:8192", "--seed", "3"],
    ["--set", "train.steps=3", "--set", "task.options={width = 3, name = 'a'}", "runs/a?b", "configs/x.toml#2"],
    ["http://host:80/a@b", "https://host/p@v1", "git@host.com:x/y", "s3://bucket/part-1.h5", "did you mean train?"],
    ["--no-auth", "--resume", "auto", "keyboard=3"],
]
HIDDEN = [
    ["--wandb-api-key=hunter2"],
    ["--wandb_api_key", "hunter2"],
    ["--wandb_apikey", "hunter2"],
    ["--token", "hunter2"],
    ["--hf-token", "-hunter2"],
    ["--db-password=a b, hunter2"],
    ["API_KEY=hunter2", "python", "x.py"],
    ["--set", "task.options.token=hunter2"],
    ["--set", "task.options={n = 3, api_key = 'a hunter2'}"],
    ['{"password": "a hunter2", "n": 3}'],
    ["-H", "Authorization: Bearer hunter2hunter2"],
    ["zip://user:hunter2@/x.zip"],
    ["zip://a.h5::https://me:hunter2@host/a"],
    ["https://me:p@ss/hunter2@host:80/a"],
    ["https://me:p#hunter2@host/a", "https://hunter2@host"],
    ["ftp://a:hunter2@b,ftp://a:hunter2@c"],
    ["https://host/a?sig=hunter2&x=1", "https://host/a?hunter2", "https://host/a#hunter2"],
    ["data.file=https://host/a.h5?X-Amz-Signature=hunter2"],
    ["failed: /webhdfs/v1/x?op=OPEN&delegation=hunter2 (timeout)"],
]


@pytest.mark.parametrize("words", HIDDEN, ids=lambda words: words[-1])
def test_secrets_of_a_command_are_not_shown(words: list[str]) -> None:
    told = command(words)
    assert len(told) == len(words) and "hunter2" not in " ".join(told) and REDACTED in " ".join(told)


@pytest.mark.parametrize("words", PASSED, ids=lambda words: words[0])
def test_the_rest_of_a_command_is_shown_as_it_is(words: list[str]) -> None:
    assert command(words) == words and message(" ".join(words)) == " ".join(words)


def test_an_address_stays_readable() -> None:
    assert without_secrets("(see https://me:pw@host:80/a?b=c)") == f"(see https://{REDACTED}@host:80/a?{REDACTED})"
    assert without_secrets("(see https://me:pw@host:80/a?b=c)", "") == "(see https://host:80/a)"
    assert (
        message("\x1b[2Ja\tb\n\udcff\x9b\r") == "\N{REPLACEMENT CHARACTER}[2Ja\tb\n" + 3 * "\N{REPLACEMENT CHARACTER}"
    )


@pytest.mark.parametrize(
    "piece", ["://", "a=", "x://a:", "?a=", "a", "Bearer ", "-", "@", "a ", "://?)", "://@", "token="]
)
def test_long_words_take_no_time(piece: str) -> None:
    began = monotonic()
    command([piece * 10_000])
    message(piece * 10_000)
    assert monotonic() - began < 5


def test_no_secret_gets_into_a_message_or_a_run_directory(tmp_path: Path, digits: Path) -> None:
    """Of a command line, whether it works or not."""
    url, option = "https://me:hunter2@host/x.h5?sig=hunter2", "task.options.api_key=hunter2"
    for words in (
        ["train", "softmax-mnist.toml", "--set", f"data.file={url}"],
        ["submit", "softmax-mnist.toml", "--nodes", "1", "--set", f"data.file={url}"],
        ["stage", "nothing://me:hunter2@host/x", "."],
        ["data", "check", url],
        ["report", url],
        ["report", ".", "--pue", url],
        ["config", "show", url],
    ):
        done = jobs.run(0, *words, cwd=tmp_path)
        assert done.code == 2 and "hunter2" not in done.out + done.err, (words, done.err)
    assert not list(tmp_path.iterdir())
    keys = jobs.settings(data__file=digits, reduce__strategy="local", train__steps=3)
    done = jobs.run(0, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, "--set", option, cwd=tmp_path)
    assert done.code == 2 and "no such option" in done.err and "hunter2" not in done.err


def test_no_secret_gets_into_a_run_directory(tmp_path: Path, digits: Path) -> None:
    secrets = {"HOROVOD_SECRET_KEY": "hunter2", "AWS_SECRET_ACCESS_KEY": "hunter2", "SLURM_JWT": "hunter2"}
    keys = jobs.settings(data__file=digits, reduce__strategy="local", train__steps=3)
    done = jobs.run(
        0, "train", jobs.CONFIGS / "softmax-mnist.toml", *keys, cwd=tmp_path, OMP_NUM_THREADS="1", **secrets
    )
    assert done.code == 0, done.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(b"hunter2" in path.read_bytes() for path in files)
    (meta,) = (json.loads(path.read_text()) for path in files if path.name == "meta.json")
    assert meta["environment"]["OMP_NUM_THREADS"] == "1" and meta["environment"]["HOROVOD_SECRET_KEY"] == REDACTED


def test_slurm_is_asked_by_name() -> None:
    told = {"SLURM_JOB_ID": "7", "SLURM_JWT": "hunter2", "SLURM_JOB_COMMENT": "hunter2"}
    assert recorded_slurm(told) == {"SLURM_JOB_ID": "7"}
