#!/bin/sh
# First process of the login host, whose network holds the bridge of all nodes: login.sh FOLDER ADDRESS
set -e
hostname login
mount --bind "$1/etc/hosts" /etc/hosts
mount --bind "$1/etc" /etc/slurm
ip link set lo up
ip link add br0 type bridge
ip addr add "$2/24" dev br0
ip link set br0 up
echo ready
exec sleep infinity
