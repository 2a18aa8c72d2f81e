"""Tables: measurements for `plan --table`, and rows for `prepare table`."""

from hypothesis import strategies as st

from tests.fuzz.damage import NUMBERS, text_damages
from tests.fuzz.play import Case, Play, finite_losses

_CELLS = st.one_of(
    st.sampled_from(
        [*NUMBERS, "a", "=1+1", '"', '"a,b"', "\x1b[31m", "1e-320", "0x1", " 7 ", "1,5", "None", "٣", "\ufeff"]
    ),
    st.integers(1, 2048).map(str),
    st.floats(1e-6, 1e6).map(lambda value: f"{value:.4g}"),
)
_PLAN_COLUMNS = [
    "ranks",
    "step_s",
    "samples_per_s",
    "ranks_per_node",
    "scaling",
    "global_batch",
    "joules",
    "x",
    "",
    "ranks",
]


@st.composite
def _measured(draw: st.DrawFn) -> str:
    """Plausible rows, whose time falls with the number of ranks, with a few impossible cells."""
    columns = [
        "ranks",
        draw(st.sampled_from(["step_s", "samples_per_s"])),
        *draw(st.lists(st.sampled_from(_PLAN_COLUMNS), max_size=3)),
    ]
    sizes = draw(st.lists(st.sampled_from([1, 2, 4, 8, 16, 32]), max_size=8))
    likely = {"ranks_per_node": "4", "scaling": "strong", "global_batch": "512", "joules": "30.5"}
    rows = [
        [
            str(size)
            if name == "ranks"
            else f"{10 / size + 0.1 * index:.4g}"
            if name in columns[1:2]
            else likely.get(name, "1")
            for name in columns
        ]
        for index, size in enumerate(sizes)
    ]
    for row, column, cell in draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4), _CELLS), max_size=3)):
        if row < len(rows) and column < len(columns):
            rows[row][column] = cell
    return "\n".join(",".join(row) for row in [columns, *rows]) + "\n"


_ROWS = st.lists(st.lists(_CELLS, min_size=1, max_size=4), max_size=12).map(
    lambda rows: "\n".join(",".join(row) for row in rows)
)


def _plan(text: str, words: list[str]) -> Case:
    def act(play: Play) -> None:
        (play.folder / "table.csv").write_bytes(text.encode(errors="surrogatepass"))
        play.hpc_train("plan", "--table", "table.csv", *words, codes=(0, 1, 2))

    return f"plan {' '.join(words)} of {text[:200]!r}", act


def _prepared(data: bytes, target: str) -> Case:
    def act(play: Play) -> None:
        (play.folder / "table.csv").write_bytes(data)
        (play.folder / "job.toml").write_bytes((play.materials / "job.toml").read_bytes())
        ended = play.hpc_train("prepare", "table", "data.h5", "--from", "table.csv", "--target", target)
        if ended.code != 0:
            return
        checked = play.hpc_train("data", "check", "data.h5", codes=(0, 1, 2))
        trained = play.hpc_train("train", "job.toml")
        if trained.code == 0 or checked.code == 0:
            finite_losses(play, play.folder / "runs")

    return f"prepare table --target {target} of {data[:200]!r}", act


@st.composite
def _rows(draw: st.DrawFn) -> bytes:
    """A table that is valid, damaged or unusable for training."""
    if draw(st.booleans()):
        return draw(_ROWS).encode(errors="surrogatepass")
    lines = [f"{index / 7:.3f},{index % 5},{index % 2}" for index in range(30)]
    data = "\n".join(["u,v,kind", *lines, ""]).encode()
    for _, damage in draw(st.lists(text_damages, max_size=2)):
        data = damage(data)
    return data


_PLAN_WORDS = [
    [],
    ["--predict", "64"],
    ["--deadline", "6h", "--steps", "1e6"],
    ["--json", "--samples", "1e12"],
    ["--model", "amdahl", "--predict", "128"],
]
_PLAN_WORDS += [
    ["--model", "extra-p"],
    ["--model", "usl", "--json"],
    ["--energy", "40kWh", "--steps", "1000"],
    ["--ranks-per-node", "4", "--node-hours", "100", "--steps", "1e300"],
]
cases: st.SearchStrategy[Case] = st.one_of(
    st.builds(_plan, st.one_of(_measured(), _measured(), _ROWS), st.sampled_from(_PLAN_WORDS)),
    st.builds(_prepared, _rows(), st.sampled_from(["kind", "u", "x", ""])),
)
