#!/bin/bash
# Upload what runs without internet wrote for W&B, from a machine that has it: finished runs and those that still train.
#   slurm/sync_wandb.sh [--interval SECONDS] [FOLDER]     FOLDER (default: runs) holds the run folders
# Looks once, or every SECONDS; only runs with news are uploaded, each with all its parts. It may be stopped at any time: a
# run counts as uploaded only after all of it was.
set -u
interval=
folder=runs
while [ $# -gt 0 ]; do
    case $1 in
    --interval) interval=${2:?--interval needs seconds} && shift ;;
    --interval=*) interval=${1#*=} ;;
    -*) sed -n '2,5s/^# //p' "$0" && exit 2 ;;
    *) folder=$1 ;;
    esac
    shift
done
[[ ${interval:-1} =~ ^[1-9][0-9]*$ ]] || { echo "error: --interval=$interval is not a number of seconds" >&2 && exit 2; }
[ -d "$folder" ] || { echo "error: there is no folder $folder: name the one that holds the runs" >&2 && exit 2; }
PATH=$PATH:$(dirname "$0")/../.venv/bin
command -v wandb >/dev/null || { echo "error: no wandb here: activate the environment first" >&2 && exit 2; }

child=
trap 'kill "$child" 2>/dev/null; exit 130' INT TERM
patiently() { # run in the background, so that the trap does not wait for it
    "$@" </dev/null &
    child=$!
    wait "$child"
}

upload() { # one run folder's wandb/, if it has news; all parts of the run, which W&B takes in order
    local stamp=$1/.uploaded
    local parts=("$1"/offline-run-*)
    [ -d "${parts[0]}" ] || return 0
    if [ -e "$stamp" ] && [ -z "$(find "${parts[@]}" -name '*.wandb' -newer "$stamp" -print -quit)" ]; then
        return 0
    fi
    touch "$stamp.next" # what is written from now on is news
    if patiently timeout 600 wandb sync --include-synced --yes "${parts[@]}"; then
        mv "$stamp.next" "$stamp"
    else
        echo "error: ${1%/wandb} was not uploaded (see above)" >&2
        rm -f "$stamp.next"
        return 1
    fi
}

while :; do
    failures=0
    for place in "$folder"/*/wandb "$folder"/*/wandb/eval/wandb; do
        upload "$place" || failures=$((failures + 1))
    done
    [ -n "$interval" ] || exit $((failures > 0))
    patiently sleep "$interval"
done
