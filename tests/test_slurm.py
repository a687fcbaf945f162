"""benchmarks/sweep.py on a SLURM of one node, if there is one: apt install slurm-wlm munge."""

import os
import shutil
import socket
import subprocess
import time

import pytest
import sweep
from helpers_run import one_error
from helpers_tools import assert_equal_runs
from test_sweep import block, grid, run_sweep, wait_for

pytestmark = pytest.mark.skipif(
    not shutil.which("slurmctld") or os.geteuid() != 0, reason="needs SLURM, and to be root"
)
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes={host} Default=YES State=UP
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two CPUs of this machine, for as long as the test takes."""
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    files = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{name}={folder}/munge.{name}" for name in files if name != "key-file"]
    munge += [f"--key-file={folder}/key", f"--socket={folder}/munge.socket"]
    daemons = []
    for command in (["munged", "-F", "-f", *munge], ["slurmctld", "-D"], ["slurmd", "-D"]):
        with (folder / f"{command[0]}.txt").open("w") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
        time.sleep(1)
    wait_for(lambda: "idle" in ask("sinfo"), 30)
    yield
    subprocess.run(["scancel", "--user=root"])
    for daemon in reversed(daemons):
        daemon.terminate()
        daemon.wait()


def ask(*command: str) -> str:
    """What a command says."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_a_grid_on_slurm(cluster, tmp_path):
    """A job that is killed and queued again ends as a run here does; a failure shows there."""
    blocks = [block("sac", total_timesteps=400), block("sac", buffer_size=10**12)]
    blocks[1] += 'exp-name = "too_large"\n'
    here = grid(tmp_path, blocks[0], run_root="here")
    assert run_sweep(here)[0] == 0
    file = grid(tmp_path, *blocks)
    code, out, err = run_sweep(file, "--slurm=--partition main --time 5")
    assert code == 0, err
    assert out == "Submitted batch job 1, 2 runs; the same command later skips what is done\n"
    runs = sweep.read_grid(sweep.Options(file))
    log = runs[0].folder.with_name(f"{runs[0].folder.name}.log")
    wait_for(lambda: log.exists() and "step     120 " in log.read_text(), 300)
    assert ask("scontrol", "requeue", "1_0") == ""
    wait_for(lambda: "PENDING" in ask("scontrol", "show", "job", "1_0"), 60)
    assert ask("scontrol", "update", "JobId=1_0", "StartTime=now") == ""  # not in two minutes
    wait_for(lambda: not ask("squeue", "-h"), 300)
    assert [run.done() for run in runs] == [True, False]
    assert log.read_text().count("$ ") == 2
    assert_equal_runs(runs[0].folder, tmp_path / "here" / runs[0].folder.name)
    assert "JobState=FAILED" in ask("scontrol", "show", "job", "1_1")
    assert "GiB exist" in (runs[0].folder.parent / "slurm-1_1.txt").read_text()
    assert "invalid partition" in one_error(run_sweep(file, "--slurm=--partition none")[2])
