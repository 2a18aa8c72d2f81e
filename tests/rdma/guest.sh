#!/usr/bin/env bash
# A guest, n1 or n2, of which this is pid 1: a network between the two, Soft-RoCE on it, and what is tried there.
#
# /shared is a folder of the host: it holds venv.txt, job.toml and what else a job needs, and takes the results.
set -uo pipefail
end() { sync; echo o >/proc/sysrq-trigger; sleep 9; }
trap end EXIT
number=$(sed -n 's/.*number=\([12]\).*/\1/p' /proc/cmdline)
venv=$(cat /shared/venv.txt)
export PATH=$venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/run LC_ALL=C.UTF-8 OMP_NUM_THREADS=1
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
hostname "n$number"
printf '127.0.0.1 localhost\n10.78.0.1 n1\n10.78.0.2 n2\n' >/etc/hosts
ulimit -l unlimited
export PYTHONPATH=${0%/tests/rdma/guest.sh}  # this checkout, whatever the environment was installed from
ip link set lo up
ip link set eth0 up
ip address add "10.78.0.$number/24" dev eth0
rdma link add rxe0 type rxe netdev eth0
# There is no sshd: what the other guest sends is run. Nobody else is on this network.
busybox nc -ll -p 99 -e /bin/bash &

cat >/run/on <<'END'
#!/bin/bash
host=$1; shift
echo "exec $*" | exec busybox nc "$host" 99
END
chmod +x /run/on

if [ "$number" = 2 ]; then
    until [ -e /shared/stop ]; do sleep 1; done
    exit
fi
until [ "$(/run/on n2 hostname)" = n2 ]; do sleep 0.5; done
cd /shared

show='cat /sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts /sys/class/net/eth0/statistics/tx_bytes'
counters() {  # packets of RoCE and bytes of Ethernet that each guest has sent
    echo $(sh -c "$show" 2>/dev/null) $(/run/on n2 "sh -c '$show' 2>/dev/null")
}

try() {  # try NAME SECONDS WORDS...: on a rank of each guest; the name's .log, and .txt: exit code, seconds, counters
    local name=$1 limit=$2 before began code
    shift 2
    echo "$name" >/dev/udp/n2/9  # a mark in the capture
    before=$(counters)
    began=$(date +%s.%N)
    timeout --kill-after=5 "$limit" mpirun -np 2 --host n1:1,n2:1 --bind-to none -x PATH -x PYTHONPATH -x LC_ALL -x OMP_NUM_THREADS \
        --mca plm_rsh_agent /run/on --mca oob_tcp_if_include eth0 "$@" >"$name.log" 2>&1
    code=$?
    { echo "$code"; echo "$began $(date +%s.%N)"; echo "$before"; counters; } >"$name.part"
    mv "$name.part" "$name.txt"
}

# Verbs alone: neither TCP nor shared memory is there to fall back to. rxe's address is made from eth0's.
verbs=(--mca pml ucx --mca pml_ucx_tls any --mca pml_ucx_devices any --mca osc '^ucx' --mca coll '^hcoll'
    -x UCX_TLS=rc_v,self -x UCX_NET_DEVICES=rxe0:1 -x UCX_UD_VERBS_ETH_DGID_CHECK=n)
tcp=(--mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include eth0 --mca coll '^hcoll')
train=(hpc-train train /shared/job.toml)

source /shared/plan.sh
touch /shared/stop
