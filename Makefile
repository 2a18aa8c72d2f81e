# make demo    install, prepare real data, train on 1 and on 2 ranks, report
# make test    install, then every test, those under mpirun and, for root, on a Slurm cluster of its own included
# make models  train every shipped job to its end and print what each reached (half an hour on two cores)
# make bench  measure this program and its peers on equal work (a quiet machine; 20 minutes)
# make bench-io  measure reading and writing of HDF5 against bounds and other libraries (a quiet machine; 4 minutes)
# make bench-plan  predict published scaling series from their small sizes, Extra-P beside (it gets an environment of its own)
# make bench-link  train over limited links against what bench allreduce predicts (root, a quiet machine)
# make bench-simulation  steps on 2 to 64 ranks of this machine against hpc-train simulate (a quiet machine; 15 minutes)
# make bench-memory  memory that `hpc-train memory` tells against what ranks take, 18 jobs (8 minutes)
# make bench-large  memory of a rank and time of a step by strategy and stage; as root over links, too (a quiet machine; 40 minutes)
# make test-rdma  train over InfiniBand verbs between two emulated guests (root, 8 minutes)
# make test-browser  the report's page in Chromium, on a screen, a phone and paper; a trace in Perfetto; screenshots in runs/screenshots
# make test-all  every test, each command started as a process of its own, every fault, and 5,000 inputs that nobody would write
# make test-fuzz  those inputs alone (15 minutes)
# make test-kills  ranks and mpirun killed at any moment, for MINUTES (30)
# make test-faults  every fault, and the table of what came of it (root for those on the cluster)
# make check   install, ruff and mypy
# make docs    the documentation as HTML: docs/_build/html
# make install install only; on a cluster: make install MPICC=$(which mpicc) HDF5_DIR=/path/to/parallel/hdf5
.PHONY: demo models bench bench-io bench-plan bench-link bench-simulation bench-large bench-memory test test-serial test-parallel test-cluster test-all test-faults test-fuzz test-kills test-rdma test-browser check docs install clean
VENV ?= .venv
export PYTHON MPICC HDF5_DIR TORCH VENV
# Slurm's daemons and ip lie in sbin, which is not everybody's PATH.
export PATH := $(abspath $(VENV))/bin:$(PATH):/usr/sbin:/sbin

# Containers switch byte code off, and each start would compile a hundred modules.
unexport PYTHONDONTWRITEBYTECODE

# Open MPI refuses root unless told twice; containers and CI machines are root.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif
MPIRUN := mpirun --quiet

install:
	@./install.sh

demo:
	@./install.sh
	@set -e; say() { printf '\n  $$ %s\n' "$$*"; "$$@"; }; \
	printf '\nFrom here to the report: about 1 minute.\n'; \
	say $(MPIRUN) -n 2 hpc-train prepare mnist-5k data/mnist-5k.h5; \
	for ranks in 1 2; do say $(MPIRUN) -n $$ranks hpc-train train configs/mlp-mnist.toml --set run.root=runs/demo --set train.steps=300; done; \
	say hpc-train report runs/demo

# The tests on the cluster mostly wait for Slurm: they run beside the serial ones, and print when those are done.
test:
	@./install.sh test
	@cluster=$$(mktemp); $(MAKE) --no-print-directory test-cluster >$$cluster 2>&1 & pid=$$!; failed=0; \
	nice -n 5 $(MAKE) --no-print-directory test-serial || failed=1; \
	wait $$pid || failed=1; cat $$cluster; rm $$cluster; exit $$failed
	@$(MAKE) --no-print-directory test-parallel

# Everything but test-rdma and test-kills. Each command is started as a process of its own: see tests/warm.
test-all: export HPC_TRAIN_COLD := 1
test-all:
	@./install.sh test
	python -m pytest -n 2 --dist worksteal $(FAULTS:%=--ignore=%) --ignore tests/fuzz
	@$(MAKE) --no-print-directory test-parallel RANKS="1 2 3 4" QUICK=
	python -m pytest tests/slurm $(FAULTS:%=--ignore=%)
	@$(MAKE) --no-print-directory test-faults test-fuzz

# On two cores. What is left over at the end of one process, the other takes.
test-serial:
	python -m pytest $(QUICK) -n 2 --dist worksteal

# 1 rank sends nothing and 4 share two cores: they are for make test-all.
RANKS ?= 2 3
# Under mpirun a failed assertion on one rank would hang the others: `python -m mpi4py` ends them all.
PYTEST_MPI = --oversubscribe --bind-to none python -m mpi4py -m pytest -x -q --color=no
QUICK = -m "not thorough and not slow"
# ALONE: in processes of their own. One starts Horovod again and again, which crashes where others have used it.
ALONE = tests/parallel/test_reduce_times.py tests/parallel/test_rest.py
test-parallel:
	@set -e; for ranks in $(RANKS); do echo "mpirun -n $$ranks pytest tests/parallel"; \
	$(MPIRUN) -n $$ranks $(PYTEST_MPI) $(QUICK) tests/parallel $(ALONE:%=--ignore=%); \
	for file in $(ALONE); do $(MPIRUN) -n $$ranks $(PYTEST_MPI) $(QUICK) $$file; done; done

# Every fault, by mpirun and on the cluster, and the table of what came of it.
FAULTS := tests/faults tests/datasets/test_hdfs.py tests/slurm/test_faults.py tests/slurm/test_submit.py \
	tests/slurm/test_gluster.py
test-faults:
	python -m pytest $(FAULTS)

# Kills ranks and mpirun at any moment by any signal, chain after chain: make test-kills MINUTES=30 SEED=0
MINUTES ?= 30
SEED ?= 0
test-kills:
	python -m tests.faults.kills --minutes $(MINUTES) --seed $(SEED)

# 5,000 inputs that nobody would write: below 15 minutes on two cores.
test-fuzz:
	python -m pytest -n 2 -q tests/fuzz

# Slurm on four nodes that are namespaces of this machine: for root; skipped elsewhere, with the reason.
test-cluster:
	python -m pytest $(QUICK) tests/slurm

# Horovod and MPI over InfiniBand verbs (Soft-RoCE) between two emulated machines: for root, about 7 minutes.
test-rdma:
	@./install.sh test rdma
	python -m pytest -s tests/rdma

# Chromium is 110 MB, from Debian: `make test` runs these where a browser is, and skips them elsewhere.
test-browser:
	@./install.sh test browser
	python -m pytest tests/analysis/report/test_browser.py tests/analysis/trace/test_perfetto.py

# What is complete is not trained again: runs/models.
models:
	@./install.sh test
	python tests/benchmarks/models.py

# The table and the figure: runs/bench. Peers get an environment of their own, runs/bench-peers.
bench:
	@./install.sh test
	python -m tests.benchmarks.peers

# As a module: a script would put its own folder, which has an io.py, before Python's.
bench-io:
	@./install.sh test
	python -m tests.benchmarks.io

# What `hpc-train memory` tells against what ranks take, 18 jobs: 8 minutes.
bench-memory:
	@./install.sh test
	python -m tests.benchmarks.memory

bench-plan:
	@./install.sh test
	python -m tests.benchmarks.plan

# Training over limited links against what bench allreduce predicts: for root, on a quiet machine.
bench-link:
	@./install.sh test
	python -m tests.benchmarks.link

# Steps of sleeping ranks, 2 to 64 of them on this machine, against what hpc-train simulate tells of them.
bench-simulation:
	@./install.sh test
	python -m tests.benchmarks.simulation

# A rank's memory and a step's time by strategy and stage: a quiet machine of 12 GB, 15 minutes. For root also over the
# links of the test cluster, with FSDP2 beside it: 25 minutes more.
bench-large:
	@./install.sh test
	python -m tests.benchmarks.large
	python -m tests.benchmarks.checkpoints
	if [ $$(id -u) = 0 ]; then python -m tests.benchmarks.large_network; fi

check:
	@./install.sh test check
	ruff check . && ruff format --check . && mypy hpc_train

# Warnings are errors; nothing is fetched.
docs:
	@./install.sh docs
	sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html

clean:
	rm -rf .venv runs data
