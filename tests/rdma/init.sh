#!/bin/busybox sh
# pid 1 of a guest's initrd: this machine's own files, read-only, below a layer in memory; then guest.sh.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
script=$($b sed -n 's/.*script=\([^ ]*\).*/\1/p' /proc/cmdline)
for module in /modules/*.ko; do $b insmod "$module"; done
shared=trans=virtio,version=9p2000.L,msize=1048576,cache=loose
$b mount -t 9p -o "ro,$shared" host /host
$b mount -t tmpfs -o size=512m layer /layer
$b mkdir /layer/upper /layer/work
$b mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work root /root
for folder in dev proc sys; do $b mount --move "/$folder" "/root/$folder"; done
# Not on /tmp: the checkout may lie there, and the layer takes what is written.
for folder in run dev/shm; do $b mkdir -p "/root/$folder"; $b mount -t tmpfs tmpfs "/root/$folder"; done
$b mkdir -p /root/shared
$b mount -t 9p -o "trans=virtio,version=9p2000.L,msize=1048576,cache=none" out /root/shared
exec $b switch_root /root /bin/bash "$script"
