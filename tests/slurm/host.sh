#!/usr/bin/env bash
# One host of the tests' cluster: pid 1 of the namespaces that stand for it. Everything here is inside them (processes,
# mounts, network, files in memory), so that the end of the head's pid 1 is the end of it all.
#
#   host.sh head SHARED...            the head: bridge and links, munge, MariaDB, slurmdbd, slurmctld; switches all nodes on
#   host.sh switch-on NODE SHARED...  from inside the head: starts a node
#   host.sh node NODE SHARED...       a compute node: munge, slurmd
#
# SHARED... are the folders below /tmp that all hosts see: the cluster's shared file system.
set -euo pipefail
me=$(realpath "$0")
etc=$(dirname "$me")/etc
nodes=(n1 n2 n3 n4)
log=/run/cluster/log

# Not a blind wait: whoever starts the cluster gives it so long, then ends it.
until_ok() { until timeout 5 "$@" >/dev/null 2>&1; do sleep 0.02; done; }

fresh() {  # fresh FOLDER SHARED...: an empty FOLDER of this host's own, in which only the shared folders remain
    local folder=$1 shared
    mount -t tmpfs -o mode=1777 tmpfs /mnt
    for shared in "${@:2}"; do
        [[ $shared == "$folder"/* ]] || continue
        mkdir -p "/mnt/${shared#"$folder"/}"
        mount --rbind "$shared" "/mnt/${shared#"$folder"/}"
    done
    mount --no-mtab --move /mnt "$folder"
}

become() {  # become NAME SHARED...: a host with this name and its own view of the file system
    hostname "$1"
    fresh /tmp "${@:2}"
    fresh /dev/shm
    mount -t proc proc /proc
    mount -t sysfs sysfs /sys
    mount -t tmpfs tmpfs /sys/fs/cgroup     # slurmd asks for the folder
}

start_munge() {
    mkdir -m 755 /run/munge
    munged --foreground --key-file=/etc/munge/munge.key --socket=/run/munge/munge.socket.2 \
        --pid-file=/run/munge/munged.pid --seed-file=/run/munge/seed --log-file=/run/munge/munged.log &
    until_ok munge --no-input
}

start_network() {
    local i node
    ip link set lo up
    ip link add br0 type bridge
    ip link set br0 up
    ip address add 10.77.0.254/24 dev br0
    for i in "${!nodes[@]}"; do
        node=${nodes[i]}
        ip netns add "$node"
        ip link add "$node" type veth peer name eth0 netns "$node"
        ip link set "$node" master br0 up
        ip -n "$node" address add "10.77.0.$((i + 1))/24" dev eth0
        ip -n "$node" link set lo up
        ip -n "$node" link set eth0 up
    done
}

start_accounting() {
    local sql=(--no-defaults --user=root)
    mariadb-install-db "${sql[@]}" --datadir=/run/db --auth-root-authentication-method=normal --skip-test-db
    mkdir /run/mysqld
    mariadbd "${sql[@]}" --datadir=/run/db --socket=/run/mysqld/mysqld.sock --skip-networking --performance-schema=OFF \
        --innodb-buffer-pool-size=64M --innodb-log-file-size=32M --innodb-flush-log-at-trx-commit=0 \
        --innodb-lock-wait-timeout=900 --pid-file=/run/mysqld/mysqld.pid &
    until_ok mariadb-admin "${sql[@]}" --socket=/run/mysqld/mysqld.sock ping
    slurmdbd -D &
    until_ok sacctmgr --noheader --immediate list cluster
}

# Slurm's plugin reads processors' counters in /dev/cpu: where there is such a folder, each node gets a simulated one.
start_meter() {
    [[ -d /dev/cpu ]] || return 0
    mount -t tmpfs tmpfs /dev/cpu
    local cpu
    for ((cpu = 0; cpu < $(nproc --all); cpu++)); do
        mkdir "/dev/cpu/$cpu"
        ((cpu == 0)) || ln -s ../0/msr "/dev/cpu/$cpu/msr"
    done
    python3 "$(dirname "$me")/meter.py" /dev/cpu/0/msr &
    until_ok test -s /dev/cpu/0/msr
}

switch_on() {
    nsenter --net="/run/netns/$1" unshare --mount --uts --ipc --pid --cgroup --fork "$me" node "$@" \
        </dev/null >>"$log/$1.log" 2>&1 &
}

head() {
    local node
    read -r outer _ </proc/self/stat        # our pid in the pid namespace of whoever mounted this /proc
    become head "$@"
    fresh /run
    mkdir -p /run/cluster/etc "$log"
    cp -a /etc/. /run/cluster/etc
    mount --bind /run/cluster/etc /etc
    mkdir -p /etc/munge /etc/slurm
    cp -r "$etc/." /etc
    [[ -d /dev/cpu ]] && echo AcctGatherEnergyType=acct_gather_energy/rapl >>/etc/slurm/slurm.conf
    chmod 600 /etc/slurm/slurmdbd.conf
    (umask 077; dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none)
    chown -R root:root /etc/munge /etc/slurm
    start_network
    echo "pid $outer"
    start_munge
    start_accounting >"$log/accounting.log" 2>&1
    for node in "${nodes[@]}"; do switch_on "$node" "$@"; done
    slurmctld -D >/dev/null 2>&1 &
    wait $!
}

node() {
    local pid
    read -r pid _ </proc/self/stat          # our pid in the head's namespace
    become "$@"
    fresh /run /run/cluster
    echo "$pid" >"/run/cluster/$1.pid"
    start_munge
    start_meter
    slurmd -D -N "$1" >/dev/null 2>&1 &
    wait $!
}

case $1 in
    head) head "${@:2}" ;;
    node) node "${@:2}" ;;
    switch-on) switch_on "${@:2}" ;;
esac
