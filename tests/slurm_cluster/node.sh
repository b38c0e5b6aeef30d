#!/bin/sh
# First process of a virtual node, in namespaces of its own: node.sh FOLDER NAME ADDRESS. Everything ends with it.
set -e
hostname "$2"
mount --bind "$1/etc/hosts" /etc/hosts
mount --bind "$1/etc" /etc/slurm
mount -t tmpfs tmpfs /dev/shm
ip link set lo up
echo ready # the cable can be plugged in now
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip addr add "$3/24" dev eth0
ip link set eth0 up
slurmd -N "$2"
while :; do # jobs' orphans become this process's children; a shell collects them while it waits
    sleep 3600 &
    wait $!
done
