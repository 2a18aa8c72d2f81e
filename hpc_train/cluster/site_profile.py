"""Site profiles: what a job script must know about a system. slurm/README.md explains every key."""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hpc_train.core.config import read_toml, shown, unknown_key
from hpc_train.core.errors import UserError
from hpc_train.core.redaction import looks_secret
from hpc_train.core.settings import Text

# slurm/ inside an installed wheel, or of the checkout
SLURM_FOLDERS = (Path(__file__).parents[1] / "shipped" / "slurm", Path(__file__).parents[2] / "slurm")
_TIME = re.compile(
    r"(?:(?P<days>[0-9]{1,3})-)?(?P<first>[0-9]{1,6})(?::(?P<second>[0-9]{1,2}))?(?::(?P<third>[0-9]{1,2}))?"
)


def time_limit_s(text: str) -> int:
    """Seconds of a time limit as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises ValueError."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("should be a time limit such as 90 (minutes), 12:00:00 or 1-12:00:00")
    days, *parts = (int(part) if part else 0 for part in found.groups())
    if found["days"] is None and found["third"] is None:  # M or M:S
        parts = [0, *parts[:2]]
    limit_s = ((days * 24 + parts[0]) * 60 + parts[1]) * 60 + parts[2]
    if limit_s <= 0:
        raise ValueError("should be more than nothing")
    return limit_s


def _time_limit(text: str) -> str:
    time_limit_s(text)
    return text


# sbatch has no reliable quoting in #SBATCH lines: their values may only contain characters that need none.
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+/@=,-]*$", max_length=200)]
Constraint = Annotated[str, Field(pattern=r"^[A-Za-z0-9\[(][A-Za-z0-9._:+=,&|!*()\[\]-]*$", max_length=200)]
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z-]*(=[A-Za-z0-9._:+/@=,&|*()\[\]%~-]+)?$", max_length=200)]
Time = Annotated[str, AfterValidator(_time_limit)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Count = Annotated[int, Field(ge=1, le=10**6)]


class SiteProfile(BaseModel):
    """A system, as its users see it. Made by `load_site`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Constraint | None = None
    time: Time = "01:00:00"
    ranks_per_node: Count = 1
    cores_per_rank: Count | None = None
    gpus_per_node: Count | None = None
    sbatch: list[Option] = []
    signal_s: Annotated[int, Field(ge=10, le=65535)] = 120
    modules: list[Text] = []
    venv: Text | None = None
    scratch: Text | None = None
    launcher: Literal["srun", "mpirun"] = "srun"
    mpi: Word = "pmix"
    bind: list[Text] = []
    energy: Literal["auto", "slurm"] = "auto"
    environment: dict[Variable, Text] = {}

    @property
    def asks_for_cores(self) -> bool:
        """Whether the job says how many cores a rank gets, or takes whole nodes."""
        words = ("--cpus-per-task", "-c", "--exclusive", "--cpus-per-gpu", "--ntasks-per-core", "--ntasks-per-socket")
        return self.cores_per_rank is not None or any(line.startswith(words) for line in self.sbatch)

    def num_nodes(self, num_ranks: int) -> int:
        return -(-num_ranks // self.ranks_per_node)

    @model_validator(mode="after")
    def _environment_has_no_secret(self) -> Self:
        for name, value in self.environment.items():
            if looks_secret(name, value):
                raise ValueError(
                    f"environment.{name} looks like a secret, and run directories keep their job script: "
                    "export it in the shell that submits instead"
                )
            if name == "OMP_NUM_THREADS":
                raise ValueError("environment.OMP_NUM_THREADS: set cores_per_rank here, or train.threads in the job")
        return self


def load_site(name: str) -> SiteProfile:
    """The shipped site profile of that name, or the one in the file `name`. Raises `UserError` naming the key."""
    path = _site_file(name)
    try:
        site = SiteProfile.model_validate(read_toml(path, "slurm/sites/generic.toml"))
    except ValidationError as error:
        raise UserError(_explain(error, path.name), "slurm/README.md explains every key of a site profile.") from None
    paths = {key: _expanded(value, key, path.name) for key in ("venv", "scratch") if (value := getattr(site, key))}
    return site.model_copy(update=paths)


def _site_file(name: str) -> Path:
    if name.endswith(".toml") or os.sep in name:
        return Path(name)
    shipped = {path.stem: path for folder in SLURM_FOLDERS for path in sorted((folder / "sites").glob("*.toml"))}
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"--site {name}: no profile of that name{hint}",
            f"Shipped profiles: {', '.join(shipped)}. For your own, give its path: --site ./mysite.toml",
        )
    return shipped[name]


def _explain(error: ValidationError, file: str) -> str:
    """One line for each wrong key."""
    lines = []
    for fault in error.errors(include_url=False):
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{file}: {unknown_key(key, SiteProfile.model_fields)}")
        elif fault["type"] == "value_error":
            lines.append(f"{file}: {key + ': ' if key else ''}{fault['ctx']['error']}")
        else:
            why = fault["msg"][:1].lower() + fault["msg"][1:]
            lines.append(f"{file}: {key} = {shown(fault['input'])}: {why}")
    return "\n".join(dict.fromkeys(lines))


def _expanded(text: str, key: str, file: str) -> str:
    """An absolute path with ~ and $NAME filled in from the submitting shell."""
    full = os.path.expanduser(os.path.expandvars(text))
    if "$" in full or not os.path.isabs(full):
        raise UserError(
            f"{file}: {key} = '{text}' is not an absolute path: '{full}'",
            "Write an absolute path; $NAME is filled in from the shell that submits.",
        )
    return full
