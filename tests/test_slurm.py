"""The templates of slurm/, as they are, on a real two-node cluster: equal weights, and every way for a job to end.

`make slurm-test` runs all of it (a quarter of an hour on two cores), `make test-all` what is not marked `cluster`.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from programs import ROOT, environment, launch, read_lines
from runs import timeless
from slurm_cluster import NODES, Cluster, Job, Unavailable, eventually

from lockstep.sweep.file import read_sweep

TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
SHELL_FILES = [*TEMPLATES, *sorted((ROOT / "slurm").glob("*.sh"))]
cluster_only = pytest.mark.cluster
pytestmark = pytest.mark.launch

# Steps of 4 microbatches for up to 4 processes.
RECIPE = (
    "--train.batch_size=256",
    "--train.micro_batch_size=64",
    "--model.name=tiny_cnn",
    "--runtime.precision=no",
    "--runtime.threads=1",
    "--optim.name=sgd",
    "--optim.lr=0.01",
    "--schedule.name=constant",
    "--checkpoint.every_epochs=20",
    "--train.validate_every_epochs=20",
    "--log.every_steps=1",
    "--log.tensorboard=false",
    "--log.figures=false",
    "--log.wandb=disabled",
)
STEPS_PER_EPOCH = 5
LONG = "--train.epochs=40"  # time to be caught in the middle
TWO_BY_TWO = ("--nodes=2", "--gpus-per-node=2", "--cpus-per-task=2")
ONE_EACH = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=1")
SUBMISSION_SECONDS = 240


@dataclass
class Site:
    """A checkout of the repository, from which jobs are submitted."""

    cluster: Cluster
    folder: Path
    env: dict[str, str]

    def submit(self, template: str, *arguments: str, options: tuple[str, ...] = TWO_BY_TWO) -> str:
        return self.cluster.submit(*options, f"slurm/{template}.sbatch", *arguments, cwd=self.folder, env=self.env)

    def finish(self, job: str, timeout_seconds: float = SUBMISSION_SECONDS) -> list[Job]:
        try:
            jobs = self.cluster.wait(job, timeout_seconds)
        except AssertionError as overdue:
            pytest.fail(f"{overdue}\n{self.printed(job)[-3000:]}")
        return jobs

    def completed(self, job: str, *, restarts: int) -> None:
        states = [(end.state, end.exit_code, end.restarts) for end in self.finish(job)]
        assert states == [("COMPLETED", 0, restarts)], self.printed(job)[-3000:]

    def printed(self, job: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"*-{job}*.out")))

    def run_at_step(self, name: str, step: int, job: str) -> Path:
        """Wait until a run has come to a step."""
        metrics = self.folder / "runs" / name / "metrics.jsonl"

        def there() -> bool:
            assert not self.cluster.jobs(job)[0].ended, self.printed(job)[-3000:]
            return metrics.exists() and f'"step": {step},' in metrics.read_text()

        eventually(there, f"step {step} of {name}", SUBMISSION_SECONDS)
        return metrics.parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    try:
        cluster = Cluster()
    except Unavailable as reason:
        pytest.skip(str(reason))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has, with this Python as its environment; the templates stay as they are."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("slurm", "configs", "accelerate_configs"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("train.py", "eval.py"):
        shutil.copy(ROOT / name, folder)
    (folder / ".venv/bin").mkdir(parents=True)
    path = f"{folder / '.venv/bin'}:{Path(sys.executable).parent}"
    (folder / ".venv/bin/activate").write_text(f"export PATH='{path}':$PATH\n")
    return folder


@pytest.fixture
def site(cluster: Cluster, checkout: Path) -> Iterator[Site]:
    yield Site(cluster, checkout, environment(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1"))
    cluster.run("scancel", "--user=root")
    for node in NODES:
        eventually(lambda node=node: not cluster.processes(node), f"{node} without processes of jobs", 60)
    eventually(lambda: cluster.states() == ["idle"] * 2, "both nodes idle", 60)


@pytest.fixture(scope="session")
def reference(checkout: Path) -> Path:
    """The same recipe on one process of this machine, never stopped."""
    done = launch(*RECIPE, LONG, "--run.name=reference", cwd=checkout)
    assert done.returncode == 0, done.stderr
    return checkout / "runs" / "reference"


def assert_same_training(run: Path, reference: Path) -> None:
    files = [folder / "checkpoints/last/model.safetensors" for folder in (run, reference)]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [[timeless(line) for line in read_lines(folder)] for folder in (run, reference)]
    assert lines[0] == lines[1]  # nothing missing, nothing twice, and every digit the same


def starts(run: Path) -> list[int]:
    """How many processes each start of a run had."""
    return [entry["processes"] for entry in json.loads((run / "environment.json").read_text())]


# ---- the files


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_files_are_clean(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here")
    done = subprocess.run(["shellcheck", "-x", str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_templates_have_one_block_to_edit_and_their_directives_count(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert path.read_text().count("---- your site: edit from here") == path.read_text().count("---- to here") == 1
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "SLURM reads none after a command"
    assert f"slurm/{path.name}" in lines[2], "the header shows the command"


# ---- the same training


@pytest.mark.slow
def test_two_nodes_train_as_one_process(site: Site, reference: Path) -> None:
    job = site.submit("multi_node", *RECIPE, LONG, "--run.name=nodes")
    site.completed(job, restarts=0)
    run = site.folder / "runs" / "nodes"
    assert starts(run) == [4]
    assert_same_training(run, reference)
    assert "node1 node2 x 2 processes of 1 threads, connecting at node1" in site.printed(job)


@pytest.mark.slow
def test_two_nodes_then_one_then_two_train_as_one_process(site: Site, reference: Path) -> None:
    run = site.folder / "runs" / "elastic"
    for nodes, last in ((2, 60), (1, 120), (2, None)):
        options = (f"--nodes={nodes}", *TWO_BY_TWO[1:])
        job = site.submit("multi_node", *RECIPE, LONG, "--run.name=elastic", options=options)
        if last is None:
            site.completed(job, restarts=0)
        else:
            site.run_at_step("elastic", last, job)
            (run / "stop").touch()
            (end,) = site.finish(job, 90)
            assert end.exit_code == 85
    assert starts(run) == [4, 2, 4]
    assert_same_training(run, reference)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, pytest.param(2, marks=cluster_only)])
def test_preempted_job_goes_on_where_it_was(nodes: int, site: Site, reference: Path) -> None:
    name = f"preempted{nodes}"
    settings = (*RECIPE, LONG, f"--run.name={name}", "--log.wandb=auto")
    job = site.submit("preemptible", *settings, options=("--partition=preempt", f"--nodes={nodes}", *TWO_BY_TWO[1:]))
    run = site.run_at_step(name, 30, job)
    urgent = site.cluster.submit(
        "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1", cwd=site.folder, env=site.env
    )
    site.completed(urgent, restarts=0)
    saved = json.loads((run / "preempted").read_text())
    assert 30 <= saved["step"] < 200 and "SIGTERM" in saved["reason"]
    site.completed(job, restarts=1)
    assert starts(run) == [2 * nodes] * 2 and not (run / "preempted").exists()
    assert_same_training(run, reference)
    copies = [path.name.rsplit("-", 1)[1] for path in (run / "wandb").glob("offline-run-*")]
    assert len(copies) == 2 and len(set(copies)) == 1, "one W&B run for life"


@pytest.mark.slow
def test_cancelled_job_stays_cancelled(site: Site) -> None:
    job = site.submit("cpu", *RECIPE, LONG, "--run.name=cancelled", options=("--cpus-per-task=2",))
    run = site.run_at_step("cancelled", 10, job)
    site.cluster.run("scancel", job)
    (end,) = site.finish(job, 60)
    assert (end.state, end.restarts) == ("CANCELLED", 0)
    eventually((run / "preempted").exists, "the program's mark", 30)
    assert json.loads((run / "summary.json").read_text())["state"] == "preempted"
    time.sleep(3)
    assert site.cluster.jobs(job)[0].state == "CANCELLED" and "requeueing" not in site.printed(job)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [1, pytest.param(5, marks=cluster_only)])
def test_array_trains_each_task_alone_and_fails_one_that_is_not_there(tasks: int, site: Site) -> None:
    name = f"sweep{tasks}.yaml"
    rates = [0.01 * (task + 1) for task in range(tasks)]
    sweep = f"program: train.py\nmethod: grid\nparameters: {{optim.lr: {{values: {rates}}}}}\n"
    (site.folder / name).write_text(sweep)
    settings = [setting for setting in RECIPE if not setting.startswith("--optim.lr")]
    settings.append(f"--run.seed={tasks}")  # no run of another array
    one = (f"--array=0-{tasks}%3", "--gpus-per-node=1", "--cpus-per-task=1")
    job = site.submit("array_sweep", name, *settings, "--train.epochs=1", options=one)
    ends = [(end.task, end.state, end.exit_code) for end in site.finish(job)]
    assert ends[:-1] == [(str(task), "COMPLETED", 0) for task in range(tasks)], site.printed(job)
    assert ends[-1] == (str(tasks), "FAILED", 2)
    assert f"{name} has the tasks 0 to {tasks - 1}, not {tasks}" in site.printed(f"{job}_{tasks}")
    configs = [path.read_text() for path in site.folder.glob("runs/digits_cnn-*/config.yaml")]
    assert len([config for config in configs if f"group: '{job}'" in config]) == tasks, "each its run, grouped"


@cluster_only
def test_stopped_array_task_goes_on_alone(site: Site, reference: Path) -> None:
    """The last task's number is the array's own: a requeue by that number would start all of them again."""
    (site.folder / "seeds.yaml").write_text("method: grid\nparameters: {run.seed: {values: [0, 1]}}\n")
    one = ("--array=0-1", "--gpus-per-node=1", "--cpus-per-task=1")
    job = site.submit("array_sweep", "seeds.yaml", *RECIPE, LONG, options=one)
    runs = site.folder / "runs"

    def both_train() -> bool:
        begun = [path.parent for path in runs.glob("digits_cnn-*/config.yaml") if f"group: '{job}'" in path.read_text()]
        return len([run for run in begun if (run / "metrics.jsonl").exists() and len(read_lines(run)) > 20]) == 2

    eventually(both_train, "both tasks train", SUBMISSION_SECONDS)
    site.cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_1")
    ends = [(end.task, end.state, end.restarts) for end in site.finish(job)]
    assert ends == [("0", "COMPLETED", 0), ("1", "COMPLETED", 1)], site.printed(job)[-3000:]
    first = next(line for line in site.printed(f"{job}_0").splitlines() if "a step is" in line).split(":")[0]
    assert_same_training(site.folder / first, reference)


# ---- all templates


@cluster_only
@pytest.mark.parametrize(
    ("template", "options", "processes"),
    [
        ("cpu", ("--cpus-per-task=2",), 2),
        ("cpu", ("--nodes=2", "--cpus-per-task=2"), 4),
        ("single_gpu", ("--cpus-per-task=1",), 1),
        ("multi_gpu", ("--gpus-per-node=2", "--cpus-per-task=2"), 2),
        ("multi_node", ("--gpus-per-node=1", "--cpus-per-task=1"), 2),
    ],
)
def test_template_trains_as_one_process(
    template: str, options: tuple[str, ...], processes: int, site: Site, reference: Path
) -> None:
    name = f"{template}{processes}"
    job = site.submit(template, *RECIPE, LONG, f"--run.name={name}", options=options)
    site.completed(job, restarts=0)
    assert starts(site.folder / "runs" / name) == [processes]
    assert_same_training(site.folder / "runs" / name, reference)


@cluster_only
def test_evaluation_and_the_same_command_again(site: Site, reference: Path) -> None:
    job = site.submit("eval", "--run", "runs/reference", options=("--cpus-per-task=1",))
    site.completed(job, restarts=0)
    expected = json.loads((reference / "summary.json").read_text())["test_accuracy"]
    assert f"accuracy {expected!r}" in site.printed(job)
    again = site.submit("single_gpu", *RECIPE, LONG, "--run.name=reference", options=("--cpus-per-task=1",))
    site.completed(again, restarts=0)
    assert "is finished" in site.printed(again)


@cluster_only
def test_agent_is_started_for_the_sweep(site: Site) -> None:
    """With a stand-in for wandb: there is no server here."""
    stand_in = site.folder / ".venv/bin/wandb"
    stand_in.write_text('#!/bin/bash\necho "wandb $* in $ACCELERATE_MIXED_PRECISION on $(hostname)"\n')
    stand_in.chmod(0o755)
    try:
        job = site.submit("wandb_agent", "team/project/abc", options=("--array=0-1", "--cpus-per-task=1"))
        assert [end.state for end in site.finish(job, 30)] == ["COMPLETED"] * 2
    finally:
        stand_in.unlink()
    assert site.printed(job).count("wandb agent --count 10 team/project/abc in bf16 on node") == 2


# ---- stopped and started again


@cluster_only
@pytest.mark.parametrize("to", ["--batch --signal=USR2", "--batch --signal=USR1", "--signal=USR2", "--signal=TERM"])
def test_signal_saves_and_requeues(to: str, site: Site, reference: Path) -> None:
    name = to.replace(" ", "").replace("=", "")
    job = site.submit("multi_node", *RECIPE, LONG, f"--run.name={name}")
    run = site.run_at_step(name, 20, job)
    site.cluster.run("scancel", *to.split(), job)
    site.completed(job, restarts=1)
    assert "requeueing" in site.printed(job) and "did not requeue" not in site.printed(job)
    assert starts(run) == [4, 4]
    assert_same_training(run, reference)


@cluster_only
def test_signal_during_the_start_is_not_lost(site: Site, reference: Path) -> None:
    """Nobody answers it before torch is there."""
    job = site.submit("cpu", *RECIPE, LONG, "--run.name=early", options=("--cpus-per-task=2",))
    eventually(lambda: "commands.launch" in " ".join(site.cluster.processes("node1")), "the launcher", 60)
    assert not (site.folder / "runs" / "early").exists(), "too late to prove anything"
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    site.completed(job, restarts=1)
    assert_same_training(site.folder / "runs" / "early", reference)


@cluster_only
def test_usr1_to_all_processes_is_not_for_us(site: Site, reference: Path) -> None:
    job = site.submit("multi_node", *RECIPE, LONG, "--run.name=usr1", options=ONE_EACH)
    site.run_at_step("usr1", 20, job)
    site.cluster.run("scancel", "--signal=USR1", job)
    site.completed(job, restarts=0)
    assert_same_training(site.folder / "runs" / "usr1", reference)


@cluster_only
def test_requeues_have_a_limit_and_a_stop_file_ends_a_job(site: Site) -> None:
    template = site.folder / "slurm" / "multi_node.sbatch"
    before = template.read_text()
    template.write_text(re.sub(r"MAX_RESTARTS=\d+", "MAX_RESTARTS=1", before))
    try:
        job = site.submit("multi_node", *RECIPE, "--train.epochs=400", "--run.name=limited", options=ONE_EACH)
    finally:
        template.write_text(before)
    site.run_at_step("limited", 10, job)
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    site.cluster.wait_until(job, lambda jobs: jobs[0].restarts == 1 and jobs[0].state == "RUNNING", 60)
    run = site.folder / "runs" / "limited"
    step = json.loads((run / "summary.json").read_text())["steps"]
    site.run_at_step("limited", step + 10, job)
    site.cluster.run("scancel", "--batch", "--signal=USR2", job)
    (end,) = site.finish(job, 90)
    assert (end.state, end.exit_code, end.restarts) == ("FAILED", 85, 1)
    assert "not started again: MAX_RESTARTS=1" in site.printed(job)

    fewer = ("--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1")
    stopped = site.submit("multi_node", *RECIPE, "--train.epochs=400", "--run.name=limited", options=fewer)
    step = json.loads((run / "summary.json").read_text())["steps"]
    site.run_at_step("limited", step + 10, stopped)
    (run / "stop").touch()
    (end,) = site.finish(stopped, 90)
    assert (end.exit_code, end.restarts) == (85, 0) and "stopped by the user" in site.printed(stopped)
    assert starts(run) == [2, 2, 1]


@cluster_only
def test_time_limit_saves_and_goes_on(site: Site) -> None:
    settings = (*RECIPE, "--run.name=limit", "--train.epochs=4000", "--train.max_steps=20000")
    job = site.submit("multi_node", *settings, options=("--time=2", "--signal=B:USR2@20", *ONE_EACH))
    site.cluster.wait_until(job, lambda jobs: jobs[0].restarts == 1 and jobs[0].state == "RUNNING", SUBMISSION_SECONDS)
    (stopped,) = map(int, re.findall(r"stopped after step (\d+) \(signal SIGUSR2\), saved", site.printed(job)))
    run = site.run_at_step("limit", stopped + 5, job)
    site.cluster.run("scancel", job)
    site.finish(job, 60)
    steps = [line["step"] for line in read_lines(run) if line["split"] == "train"]
    assert len(steps) > 5 and steps == sorted(set(steps))


@cluster_only
def test_lost_node_comes_back_and_training_goes_on(site: Site, reference: Path) -> None:
    settings = (*RECIPE, LONG, "--run.name=lost", "--checkpoint.every_steps=10")
    job = site.submit("preemptible", *settings, options=ONE_EACH)
    run = site.run_at_step("lost", 30, job)
    site.cluster.crash("node2")
    try:
        site.cluster.wait_until(job, lambda jobs: (jobs[0].state, jobs[0].restarts) == ("PENDING", 1), 90)
    finally:
        site.cluster.boot("node2")
    site.completed(job, restarts=1)
    assert starts(run) == [2, 2] and not (run / "preempted").exists()
    assert_same_training(run, reference)


# ---- what goes wrong


@cluster_only
def test_taken_port_is_left_for_the_next(site: Site) -> None:
    settings = (*RECIPE, "--train.epochs=1", "--run.name=port")
    job = site.submit("multi_node", *settings, options=("--hold", *ONE_EACH))
    port = 20000 + int(job) % 10000
    listen = f"import socket, sys; s = socket.create_server(('', {port})); print('ready', flush=True); sys.stdin.read()"
    listener = site.cluster.start_on("node1", sys.executable, "-c", listen)
    try:
        assert listener.stdout and listener.stdout.readline() == "ready\n"
        site.cluster.run("scontrol", "release", job)
        site.completed(job, restarts=0)
    finally:
        listener.communicate(timeout=10)
    assert f"connecting at node1:{port + 1}" in site.printed(job)


@cluster_only
def test_killed_rank_ends_the_job(site: Site) -> None:
    job = site.submit("preemptible", *RECIPE, LONG, "--run.name=killed", options=ONE_EACH)
    site.run_at_step("killed", 20, job)
    rank = site.cluster.start_on("node2", "pgrep", "--newest", "--full", "train.py.*run.name=killed").communicate()[0]
    assert site.cluster.start_on("node2", "kill", "-KILL", rank.strip()).wait(10) == 0
    killed = time.monotonic()
    (end,) = site.finish(job, 60)
    assert (end.state, end.restarts) == ("FAILED", 0) and time.monotonic() - killed < 60
    assert "exitcode" in site.printed(job) and "-9" in site.printed(job)


@cluster_only
def test_wrong_number_of_tasks_is_refused(site: Site) -> None:
    job = site.submit("multi_node", *RECIPE, options=("--ntasks-per-node=2", *TWO_BY_TWO))
    (end,) = site.finish(job, 30)
    assert (end.state, end.exit_code) == ("FAILED", 1)
    assert "this job has 2(x2) tasks per node" in site.printed(job) and "--ntasks-per-node=1" in site.printed(job)


@cluster_only
@pytest.mark.parametrize(
    ("argument", "code", "message"),
    [
        ("--data.source=folder:/nowhere", 1, "error: --data.source='folder:/nowhere'"),
        ("--optim.lrr=1", 2, "error: unknown setting --optim.lrr. Did you mean optim.lr or"),
    ],
)
def test_mistake_ends_the_job_with_its_line(argument: str, code: int, message: str, site: Site) -> None:
    job = site.submit("multi_node", *RECIPE, argument, options=ONE_EACH)
    (end,) = site.finish(job, 90)
    assert (end.state, end.exit_code) == ("FAILED", code)
    assert message in site.printed(job)


def test_sweep_files_have_as_many_tasks_as_the_templates_example_says() -> None:
    text = (ROOT / "slurm" / "array_sweep.sbatch").read_text()
    last, name = re.findall(r"--array=0-(\d+)%\d+ slurm/array_sweep.sbatch (\S+)", text)[0]
    assert len(read_sweep(ROOT / name).tasks) == int(last) + 1
