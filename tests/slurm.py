"""Stands in for Slurm's four commands, named by the file that this is copied to: a batch job is a local process.

As with `sbatch --export=NIL`, a job gets no variable of its submitter. What happened is in the folder of the copies:
N.json, the words of the submission; N.rc, the exit code; N.cancelled.
"""

import getpass
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

HERE, words = Path(__file__).resolve().parent, sys.argv[1:]
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)


def sbatch() -> None:
    number = len(list(HERE.glob("*.json"))) + 1
    run = f'bash {words[-1]}; code=$?; echo $code > "{HERE}/{number}.rc"'
    with open(flags["output"].replace("%j", str(number)), "w") as output:
        own = {"SLURM_JOB_ID": str(number), "SLURMD_NODENAME": "localhost"}
        job = subprocess.Popen(
            ["bash", "-c", run], cwd=flags["chdir"], env=own, stdout=output, stderr=output, start_new_session=True
        )
    (HERE / f"{number}.json").write_text(json.dumps({"words": words, "pid": job.pid, **flags}))
    print(number)


def squeue() -> None:
    for path in HERE.glob("*.json"):
        job = json.loads(path.read_text())
        ended = path.with_suffix(".rc").exists() or path.with_suffix(".cancelled").exists()
        if job["job-name"] == flags["name"] and not ended:
            print(f"{path.stem}|RUNNING|{os.getuid()}|{job['comment']}|{job['job-name']}")


def sacct() -> None:
    if "jobs" not in flags:
        return
    path = HERE / f"{flags['jobs']}.json"
    code = path.with_suffix(".rc").read_text().strip() if path.with_suffix(".rc").exists() else "0"
    state = "CANCELLED" if path.with_suffix(".cancelled").exists() else "FAILED" if int(code) else "COMPLETED"
    name = json.loads(path.read_text())["job-name"]
    print(f"{path.stem}|{name}|{getpass.getuser()}|{state}|{code}:0|{code}:0")


def scancel() -> None:
    path = HERE / f"{words[-1]}.json"
    path.with_suffix(".cancelled").touch()
    os.killpg(json.loads(path.read_text())["pid"], signal.SIGKILL)


{"sbatch": sbatch, "squeue": squeue, "sacct": sacct, "scancel": scancel}[Path(__file__).name]()
