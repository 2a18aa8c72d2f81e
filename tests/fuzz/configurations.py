"""Job files: keys and values that are right, almost right, or nonsense."""

from typing import Any

import tomli_w
from hypothesis import strategies as st

from hpc_train.core.settings import Config
from tests.fuzz.materials import JOB
from tests.fuzz.play import Case, Play, finite_losses

_WORDS = [
    "",
    "auto",
    "adamw",
    "lars",
    "cosine",
    "step",
    "gpt",
    "mlp",
    "resnet",
    "vgg",
    "train/inputs",
    "data.h5",
    "\x1b[31m",
    "a" * 3000,
]
_WORDS += [
    "../../x",
    "os:system",
    "nan",
    "é",
    "*",
    "none",
    "language",
    "masked_language",
    "train/targets",
    "/",
    "fp16",
    "bf16",
    "dqn",
]
_SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.integers(-3, 20),
    st.sampled_from([0, -1, 2**31, 2**63 - 1, 10**12]),
    st.floats(),
    st.sampled_from([0.1, 1.0, 1e-300, 1e30, 5e-324]),
    st.sampled_from(_WORDS),
    st.text(max_size=8),
)
_VALUES = st.one_of(
    _SCALARS,
    _SCALARS,
    st.lists(_SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["hidden", "depth", "width", "x"]), _SCALARS, max_size=2),
)
_KEYS = [
    f"{section}.{key}"
    for section, field in Config.model_fields.items()
    if hasattr(field.annotation, "model_fields")
    for key in field.annotation.model_fields  # type: ignore[union-attr]
]
# A valid value of these may take hours, or start what a test must not start.
_LEFT = {
    "train.compile",
    "energy.idle_s",
    "reduce.strategy",
    "train.steps",
    "run.root",
    "train.global_batch",
    "data.memory_mb",
    "task.kind",
}
_KEYS = [key for key in [*_KEYS, "name", "seed", "task.model", "train.lrr", "trian.steps"] if key not in _LEFT]
_OPTIONS = st.fixed_dictionaries(
    {
        "task.model": st.sampled_from(["mlp", "resnet", "vgg", "softmax"]),
        "task.options": st.dictionaries(
            st.sampled_from(["hidden", "depth", "width", "stem", "dropout", "batch_norm"]), _VALUES, max_size=3
        ),
    }
)
_LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "train.optimizer": st.sampled_from(["sgd", "adamw", "lars", "lamb"]),
    "train.schedule": st.sampled_from(["constant", "linear", "cosine", "step"]),
    "train.precision": st.sampled_from(["fp32", "bf16", "fp16"]),
    "train.lr": st.sampled_from([1e-300, 1e-3, 0.1, 10.0, 1e10, 1e30, 1e300]),
    "train.accumulate": st.integers(1, 10),
    "train.weight_decay": st.sampled_from([0.0, 0.1, 1e10, 1e300]),
    "train.clip_norm": st.sampled_from([0.0, 1e-30, 1.0, 1e300]),
    "train.momentum": st.sampled_from([0.0, 0.9, 0.999999]),
    "checkpoint.keep": st.integers(0, 3),
    "data.shuffle_chunks": st.integers(0, 3),
}


@st.composite
def _changes(draw: st.DrawFn) -> dict[str, Any]:
    changes = {key: draw(_VALUES) for key in draw(st.lists(st.sampled_from(_KEYS), max_size=2))}
    changes |= {key: draw(_LIKELY[key]) for key in draw(st.lists(st.sampled_from(sorted(_LIKELY)), max_size=3))}
    return changes | (draw(_OPTIONS) if draw(st.integers(0, 3)) == 0 else {})


def _text(changes: dict[str, Any]) -> str:
    import tomllib

    told = tomllib.loads(JOB)
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        place = told.setdefault(section, {}) if dot else told
        place[name if dot else key] = value
    return tomli_w.dumps(told)


def _case(changes: dict[str, Any]) -> Case:
    def act(play: Play) -> None:
        (play.folder / "data.h5").symlink_to(play.materials / "data-gzip.h5")
        (play.folder / "job.toml").write_text(_text(changes), errors="surrogatepass")
        shown = play.hpc_train("config", "show", "job.toml", numbers=False)
        ended = play.hpc_train("train", "job.toml")
        if ended.code == 0:
            assert shown.code == 0, "what cannot be shown is trained"
            finite_losses(play, play.folder / "runs")

    return ascii(changes)[:300], act


def _broken(text: str) -> Case:
    def act(play: Play) -> None:
        (play.folder / "job.toml").write_bytes(text.encode(errors="surrogatepass"))
        play.hpc_train("config", "show", "job.toml", numbers=False)

    return f"job file {text[:60]!r}", act


_TEXTS = st.one_of(
    st.text(max_size=60),
    st.integers(0, len(JOB)).map(lambda at: JOB[:at]),
    st.tuples(st.integers(0, len(JOB)), st.text(max_size=3)).map(
        lambda told: JOB[: told[0]] + told[1] + JOB[told[0] :]
    ),
    st.sampled_from(
        ["x = " + "[" * 5000, "x = " + "9" * 5000, "[a]\n" * 3, "x." * 3000 + "y = 1", "name = {" + "a.b={" * 400]
    ),
)
cases: st.SearchStrategy[Case] = st.one_of(_changes().map(_case), _changes().map(_case), _TEXTS.map(_broken))
