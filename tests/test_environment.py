"""What of the environment ends up in a run directory: by name, and never a secret."""

import json
from pathlib import Path

import pytest

from hpc_train.environment import REDACTED, looks_secret, recorded, recorded_slurm
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
