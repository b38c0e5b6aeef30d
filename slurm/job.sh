# shellcheck shell=bash
# What the templates share; they source it in the batch shell, which runs on the job's first node.
#   launch [-m] PROGRAM ARGUMENTS...   start it on every node and wait for its end
#   train [-m] PROGRAM ARGUMENTS...    launch a training that saves and starts again when SLURM stops it
# SLURM's own variables: https://slurm.schedmd.com/sbatch.html

fail() {
    echo "error: $*" >&2
    exit 1
}

# The templates' settings: ENVIRONMENT, PRECISION, INTERNET, MAX_RESTARTS and, for CPU jobs, PROCESSES_PER_NODE.
set_up() {
    cd "$SLURM_SUBMIT_DIR" || exit 1
    # shellcheck disable=SC1090  # the site's own file
    . "$ENVIRONMENT" || fail "ENVIRONMENT=$ENVIRONMENT cannot be sourced: correct it at the top of the template"
    unset SLURM_EXPORT_ENV # of `sbatch --export=NONE`: steps would start without PATH
    [[ $SLURM_TASKS_PER_NODE =~ ^1(\(x[0-9]+\))?$ ]] || fail "this job has $SLURM_TASKS_PER_NODE tasks per node, but" \
        "one launcher per node starts all its processes: submit with --ntasks-per-node=1"
    [ "$INTERNET" = yes ] || export WANDB_MODE="${WANDB_MODE:-offline}" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

    PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
    [ "$PROCESSES_PER_NODE" -gt 0 ] || fail "no GPU was given to this job: submit with --gpus-per-node, or slurm/cpu.sbatch"
    # The program compares: launched wrongly, every process would train alone.
    export EXPECTED_WORLD_SIZE=$((SLURM_NNODES * PROCESSES_PER_NODE))
    local cpus=${SLURM_CPUS_PER_TASK:-$PROCESSES_PER_NODE}
    export SRUN_CPUS_PER_TASK=$cpus # srun does not inherit it from sbatch
    export OMP_NUM_THREADS=$((cpus > PROCESSES_PER_NODE ? cpus / PROCESSES_PER_NODE : 1))

    local nodes
    nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol does not answer"
    MASTER_ADDR=${MASTER_ADDR:-${nodes%%$'\n'*}}
    MASTER_PORT=${MASTER_PORT:-$(free_port $((20000 + SLURM_JOB_ID % 10000)))} # two jobs on a node have two numbers
    export -n MASTER_ADDR MASTER_PORT # one process alone must not believe that there are others to meet
    restarts=${SLURM_RESTART_COUNT:-0}
    echo "job $SLURM_JOB_ID, restart $restarts: ${nodes//$'\n'/ } x $PROCESSES_PER_NODE processes" \
        "of $OMP_NUM_THREADS threads, connecting at $MASTER_ADDR:$MASTER_PORT"
}

free_port() { # the given one, or the next that nobody listens on
    local port=$1
    while (exec 3<>"/dev/tcp/127.0.0.1/$port" || exec 3<>"/dev/tcp/$HOSTNAME/$port") 2>/dev/null; do
        port=$((port + 1))
    done
    echo "$port"
}

launch() {
    # Files for one process and for several, so that the user's own default of `accelerate config` has no say.
    local hardware=multi_node
    if [ "$EXPECTED_WORLD_SIZE" = 1 ]; then
        hardware=gpu
        [ -z "${ACCELERATE_USE_CPU:-}" ] || hardware=cpu
    fi
    # torchrun would hand a signal on a second time and kill its ranks 30 seconds later. Here launchers ignore what the
    # ranks answer: they save together and leave.
    export PET_SIGNALS_TO_HANDLE=SIGINT
    # SLURM_NODEID is the node's in the step alone: quoted, so that it is replaced there.
    # shellcheck disable=SC2016
    srun --kill-on-bad-exit=1 bash -c '
        trap "" USR1 USR2 TERM
        exec python -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" "$@"' launcher \
        --config_file "accelerate_configs/$hardware.yaml" --mixed_precision "$PRECISION" --dynamo_backend no \
        --num_machines "$SLURM_NNODES" --num_processes "$EXPECTED_WORLD_SIZE" \
        --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" "$@" &
    step_pid=$!
    while kill -0 "$step_pid" 2>/dev/null; do # a trapped signal ends `wait`, but not the step
        if [ -z "$asked" ]; then
            wait "$step_pid"
        else # again and again: processes that are still starting ignore it, and srun itself must have begun
            sleep 2
            [ -e "$marker" ] || kill -USR2 "$step_pid" 2>/dev/null
        fi
    done
    wait "$step_pid" # its exit code
}

train() {
    local run_dir code
    run_dir=$(python "$@" --print_run_dir) || exit
    [ "$restarts" -le "$MAX_RESTARTS" ] || fail "$run_dir was restarted $restarts times, and MAX_RESTARTS=$MAX_RESTARTS:" \
        "look above for the reason; the same sbatch command continues"
    # Launchers turn every exit code into 1, so the program says by this file that it has saved and waits.
    marker=$run_dir/preempted
    rm -f "$marker"
    if [ -z "$asked" ]; then
        launch "$@"
        code=$?
        [ -e "$marker" ] || exit $code
    fi
    if [ -n "$cancelled" ] || grep -qs '"reason": "file ' "$marker"; then
        echo "stopped by the user and saved in $run_dir; the same sbatch command continues"
    elif [ "$restarts" -ge "$MAX_RESTARTS" ]; then
        echo "saved in $run_dir, not started again: MAX_RESTARTS=$MAX_RESTARTS; the same sbatch command continues"
    else
        echo "saved in $run_dir; requeueing"
        # Of an array, only this task. SLURM soon ends what still runs here, and a script that ended first would count.
        scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}" &&
            exec sleep 60
        echo "SLURM did not requeue this job; the same sbatch command continues"
    fi
    exit 85
}

asked='' cancelled='' marker=''
trap 'asked=yes' USR1 USR2 # the time limit is near (#SBATCH --signal=B:USR2@...)
trap 'cancelled=yes' TERM  # scancel tells the batch shell and the step, preemption the step alone
set_up
