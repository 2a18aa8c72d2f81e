import re
import tomllib
from pathlib import Path

import pytest

from hpc_train.core.config import comparable, dumps, load
from hpc_train.core.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.toml"))
MINIMAL = 'name = "x"\n[data]\nfile = "x.h5"\n[train]\nsteps = 10\nglobal_batch = 4\n'


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_jobs_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = load(path)
    copy = tmp_path / "copy.toml"
    copy.write_text(dumps(loaded))
    assert load(copy).config == loaded.config
    assert loaded.config.name == path.stem


def test_later_sources_win_and_every_value_tells_its_own(job: Path) -> None:
    loaded = load(job, ("train.lr=0.25", "run.root=elsewhere", "name=123"))
    assert loaded.config.train.lr == 0.25
    assert loaded.config.run.root == "elsewhere"
    assert loaded.config.name == "123", "a text key takes its text as it is"
    assert loaded.origin["train.lr"] == "--set"
    assert loaded.origin["train.steps"] == "file job.toml"
    assert loaded.origin["train.momentum"] == "default"
    assert "lr = 0.25" in dumps(loaded) and "# --set" in dumps(loaded)


def test_model_options_round_trip(job: Path) -> None:
    loaded = load(job, ("task.options={hidden = [3, 4], flag = true}",))
    assert tomllib.loads(dumps(loaded))["task"]["options"] == {"hidden": [3, 4], "flag": True}


@pytest.mark.parametrize(
    "override, words",
    [
        ("data.batc=3", "--set: unknown key data.batc; did you mean train.global_batch?"),
        ("train.step=5", "--set: unknown key train.step; did you mean train.steps?"),
        ("trian.steps=5", "unknown key trian"),
        ("train.steps=ten", "--set: train.steps = 'ten': input should be a valid integer"),
        ("train.steps=2.5", "train.steps = 2.5"),
        ("train.steps=true", "train.steps = True"),
        ("train.lr=nan", "train.lr = nan: input should be a finite number"),
        ("train.lr=inf", "train.lr = inf"),
        ("train.lr=-0.1", "train.lr = -0.1: input should be greater than 0"),
        ("train.momentum=1.5", "train.momentum = 1.5"),
        ("train.global_batch=-3", "train.global_batch = -3: input should be greater than or equal to 1"),
        ("seed=99999999999999999999", "seed = 99999999999999999999"),
        ("run.root=a\0b", "run.root = "),
        (
            "reduce.strategy=ring",
            "'ring': input should be 'horovod', 'mpi', 'torch', 'parameter_server', 'sharded', 'local' or 'own'",
        ),
        ("train.optimizer=adam", "'sgd', 'adamw', 'lars' or 'lamb', or an import path, 'package.module:name'"),
        ("name=../up", "name = '../up'"),
        ("name=a b; rm", "name = 'a b; rm'"),
        ("task=3", "task = 3: should be a table [task]"),
        ("task.options.hidden={}", "task.options"),
        ("train.steps", "no key=value"),
        ("train.steps.more=1", "steps is a value, not a section"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(job: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load(job, (override,))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "does not exist"),
        ("name = ", "is not TOML"),
        ("name = 'x'\nname = 'y'", "is not TOML"),
        ("name = 'x'", "train is required and not set"),
        ("name = 'x'\n[train]\nsteps = 1\nglobal_batch = 1", "data.file is required and not set"),
        (
            MINIMAL + "[reduce]\nstrategy = 'sharded'\ncompression = 'fp16'",
            "reduce.compression = 'fp16' does not go with",
        ),
        (
            MINIMAL.replace("[data]", "[data]\nread = 'memory'") + "[reduce]\nstrategy = 'parameter_server'",
            "data.read = 'memory' does not go with reduce.strategy = 'parameter_server'",
        ),
        (MINIMAL + "optimizer = 'lars'\n[reduce]\nstrategy = 'sharded'", "train.optimizer = 'lars' needs whole layers"),
        (MINIMAL + "lerning_rate = 1.0", "job.toml: unknown key train.lerning_rate"),
        (MINIMAL.replace("global_batch = 4", ""), "train.batch_per_rank is needed, and neither is set"),
        (MINIMAL + "batch_per_rank = 2", "train.batch_per_rank is needed, and both are set"),
        ("\xff", "is not TOML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "job.toml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        load(path)
    assert words in str(caught.value) and "job.toml" in str(caught.value)


@pytest.mark.parametrize("text", ["x", '"x"', "'x'"])
def test_text_may_be_quoted_as_in_toml(job: Path, text: str) -> None:
    assert load(job, (f"name={text}",)).config.name == "x"
    assert load(job, (f"run.interface={text}",)).config.run.interface == "x"


@pytest.mark.parametrize("text", ["123", "true", "1e5", "2026-01-01"])
def test_text_that_looks_like_another_type_stays_text(job: Path, text: str) -> None:
    assert load(job, (f"name={text}",)).config.name == text


def test_either_batch_key_can_be_asked_for_on_the_command_line(job: Path) -> None:
    weak = load(job, ("train.batch_per_rank=5",)).config.train
    assert (weak.global_batch, weak.batch_per_rank, weak.batch_size(3)) == (None, 5, 15)


@pytest.mark.parametrize("text, value", [(".5", 0.5), ("1e-3", 1e-3), ("2.", 2.0), ("1", 1.0)])
def test_numbers_may_be_written_as_people_do(job: Path, text: str, value: float) -> None:
    assert load(job, (f"train.lr={text}",)).config.train.lr == value


def test_what_is_written_is_what_was_read(job: Path, tmp_path: Path) -> None:
    awkward = (
        'data.file=my  data "x".h5',
        'task.options={hidden = [1, 2], name = "a  b"}',
        "task.options.hidden=[8, 9]",
    )
    loaded = load(job, awkward)
    copy = tmp_path / "copy.toml"
    copy.write_text(dumps(loaded))
    assert load(copy).config == loaded.config
    assert loaded.config.data.file == 'my  data "x".h5' and loaded.config.task.options["hidden"] == [8, 9]


def test_every_key_is_printed_with_where_it_came_from(job: Path) -> None:
    printed = dumps(load(job, ("train={steps = 5, batch_per_rank = 2}", "task.options.hidden=[8]")))
    lines = {line.split(" = ")[0].split(" =")[0]: line for line in printed.splitlines() if "=" in line}
    assert lines["# num_classes"].endswith("# not set") and lines["# global_batch"].endswith("# not set")
    assert lines["steps"].endswith("# --set") and lines["options"].endswith("# --set")


def test_a_byte_order_mark_is_no_mistake(job: Path) -> None:
    job.write_bytes(b"\xef\xbb\xbf" + job.read_bytes())
    assert load(job).config.name == "x"


def test_two_mistakes_are_told_at_once(job: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(job, ("train.lr=-1", "train.steps=0"))
    assert "train.lr" in str(caught.value) and "train.steps" in str(caught.value)


def test_runs_are_compared_by_what_decides_a_steps_cost(job: Path) -> None:
    base = comparable(load(job).config)
    assert (
        comparable(load(job, ("run.root=other", "name=y", "seed=3", "train.log_every=7", "energy.sample_hz=2")).config)
        == base
    )
    of_the_centre = ("energy.pue=1.2", "energy.idle_s=5", "energy.price_per_kwh=0.3", "energy.currency=EUR")
    assert comparable(load(job, of_the_centre).config) == base
    assert comparable(load(job, ("train.global_batch=8",)).config) != base
    assert comparable(load(job, ("reduce.strategy=mpi",)).config) != base


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("energy.pue=0.9",), "energy.pue = 0.9: input should be greater than or equal to 1"),
        (("energy.co2_g_per_kwh=-1",), "energy.co2_g_per_kwh = -1"),
        (("energy.idle_w=0",), "energy.idle_w = 0"),
        (("energy.idle_s=5", "energy.idle_w=90"), "energy.idle_s = 5 (measure) and energy.idle_w = 90 (given)"),
        (("energy.price_per_kwh=0.3",), "energy.price_per_kwh = 0.3 has no energy.currency"),
    ],
)
def test_what_is_said_of_energy_must_be_possible(job: Path, overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        load(job, overrides)
    shown = dumps(load(job, ("energy.pue=1.2",)))
    assert re.search(r"^pue = 1.2 +# --set$", shown, re.M) and re.search(r"^# co2_g_per_kwh = +# not set$", shown, re.M)
