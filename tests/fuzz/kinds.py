"""All kinds of input, and how many of the 5,000 cases of `make test-all` are of each kind."""

from hypothesis.strategies import SearchStrategy

from tests.fuzz import checkpoints, command_lines, configurations, hdf5_files, paths, run_directories, tables
from tests.fuzz.play import Case

KINDS: dict[str, SearchStrategy[Case]] = {
    "configurations": configurations.cases,
    "paths": paths.cases,
    "command-lines": command_lines.cases,
    "tables": tables.cases,
    "run-directories": run_directories.cases,
    "hdf5-files": hdf5_files.cases,
    "checkpoints": checkpoints.cases,
}
SHARES = {
    "configurations": 800,
    "paths": 1000,
    "command-lines": 1200,
    "tables": 700,
    "run-directories": 300,
    "hdf5-files": 600,
    "checkpoints": 400,
}
