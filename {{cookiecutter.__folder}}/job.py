"""Run a federation: `python job.py`. All flags: `python job.py --help`.

Command line -> data -> recipe -> simulator, POC or sites -> `runs/<name>/` with the final model and `results.json`.
"""

import argparse
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import RunError, UserError, exit_code
from federation.launch.options import ALGORITHMS, PROJECT, check_model, parse, validate
from federation.protocol import write_json
from federation.run.folder import new_run, point_latest_to

if TYPE_CHECKING:  # Lightning takes seconds
    from data import Holdings

START = time.monotonic()


def main() -> int:
    options = parse()
    validate(options)
    os.chdir(PROJECT)
    check_model(options.model_class)
    if options.check:
        return check(options)
    holdings = get_data(options)
    if options.resume:
        from federation.launch import resume

        resume.check(options, holdings)
    if options.export:
        export(options, holdings)
    elif options.prepare_only:
        print(f"{options.dataset} is ready")
    else:
        federate(options, holdings, new_run(options.name, options.overwrite))
    return 0


def get_data(options: argparse.Namespace) -> "Holdings":
    """Fetch and convert what is missing, and say who holds what: data.py's `Holdings`."""
    import federation.site.quick_start  # noqa: F401 (before Lightning)

    # isort: split
    import data

    if options.env == "prod":  # the images are at the sites
        return data.Holdings(data.known_classes(options), {}, {})
    data.prepare(options)
    return data.describe(options)


def federate(options: argparse.Namespace, holdings: "Holdings", folder: Path) -> dict[str, Any]:
    """Run the federation and return its result, which is in `results.json` too.

    Raises:
        RunError: a site failed.
    """
    import torch

    import results
    from federation.launch import display, resume, simulator, tracking
    from federation.run import outcome, schema

    torch.set_num_threads(1)  # this process and the server do little: the cores are the clients'
    has_gpu = torch.cuda.is_available()
    if has_gpu and not options.gpu:
        print("A GPU is present but not used: --gpu switches it on")
    if options.gpu and not has_gpu:
        print("WARNING: --gpu was asked for, but there is no CUDA GPU here: training on the CPU")

    try:
        write_json(folder / "partition.json", dataclasses.asdict(holdings))
        job = build_job(options, holdings, folder)
    except BaseException:  # nothing has run: nothing is lost, and the name is free again
        shutil.rmtree(folder)
        raise
    if holdings.counts:
        results.show_holdings(holdings.counts)
    print(
        f"\nrun {folder}: {ALGORITHMS[options.algorithm]}, sites: {options.n_clients}, rounds: {options.num_rounds}, "
        f"log: {folder}/log.txt"
    )
    if options.resume:
        print(resume.note(options))

    logs = {site: folder / "workspace" / site / "log.txt" for site in holdings.sites}  # real sites keep theirs
    run_job = simulator.simulate
    if options.env == "poc":
        from federation.launch.poc import rehearse as run_job
    elif options.env == "prod":
        from federation.launch.prod import submit as run_job
    try:
        with display.follow(logs, options.num_rounds, options.verbose, options.first_round) as follow:
            run_job(job, folder, options, follow)
        names = options.sites or list(holdings.sites)
        brought = outcome.bring_home(folder, options.num_rounds, names, options.patience, options.env != "sim")
    except RunError as error:
        raise RunError(outcome.failure(folder, error)) from None
    finally:
        tracking.gather(options.tracking, folder)
    shared = brought.pop("counts")  # real sites: each decides whether it tells
    device = torch.cuda.get_device_name() if options.gpu and has_gpu else "cpu"
    threads = int(os.environ.get("OMP_NUM_THREADS") or simulator.threads_per_client(options.n_clients))
    result = schema.compose(
        options, brought, device, None if options.env == "prod" else threads, time.monotonic() - START
    )
    try:  # before anything is printed: whatever goes wrong with that, the result is there
        write_json(folder / "results.json", result, indent=2)
        if shared:
            write_json(folder / "partition.json", dataclasses.asdict(dataclasses.replace(holdings, counts=shared)))
    except OSError as error:
        raise RunError(f"cannot write the results into {folder}: {error.strerror}") from None
    point_latest_to(folder)
    tracking.add_global_curves(options.tracking, folder, result)
    if shared:
        results.show_holdings(shared)
    results.show(result)
    print(f"{folder}/results.json has all figures, {folder}/{result['model']} the model")
    return result


def build_job(options: argparse.Namespace, holdings: "Holdings", run: Path) -> Path:
    """Write the job, which is all that the server and the sites get, into a run's folder, and return its own folder."""
    from federation.launch import recipes, tracking

    recipe = recipes.build(options, holdings, run)
    tracking.add_tracking(recipe, options.tracking, run)
    recipe.export(str(run))
    return run / recipe.name


def export(options: argparse.Namespace, holdings: "Holdings") -> None:
    """Write the job for real sites to `options.export`: what a submission sends, to be reviewed or submitted."""
    sys.argv = sys.argv[:1]  # NVFlare has an --export of its own, and warns
    from federation.launch import prod

    # Not a run, but within the project: NVFlare bundles files only by a relative path.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=".") as folder:
        run = Path(os.path.relpath(folder)) / (options.name or Path(options.export).name)
        run.mkdir()
        job = build_job(options, holdings, run)
        prod.address(job, options.sites)
        try:
            shutil.copytree(job, options.export)
        except OSError as error:
            raise UserError(f"--export: {options.export} cannot be written: {error}") from None
    print(f"{options.export} is the job: submit it with  nvflare job submit -j {options.export} --startup-kit KIT")


def check(options: argparse.Namespace) -> int:
    """One short round, on digits where the chosen data cannot be had, judged by its outcome."""
    options.n_clients, options.num_rounds, options.local_epochs = min(options.n_clients, 4), 1, 1
    options.total_rounds = 1
    options.max_batches = 4
    try:
        try:
            holdings = get_data(options)
        except UserError as error:
            print(f"{error}\nChecking with digits instead.")
            options.dataset, options.partition = "digits", "iid"
            os.environ.pop("FL_DATA_ROOT", None)
            holdings = get_data(options)
        folder = new_run(options.name, options.overwrite)
        result = federate(options, holdings, folder)
        from federation.run.check import find_fault

        if fault := find_fault(folder, result, list(holdings.sites), len(holdings.classes)):
            raise RunError(f"{fault}\nThe whole log: {folder}/log.txt")
    except (UserError, RunError, OSError) as error:
        print(f"\nNOT VERIFIED: {error}\nTry again with: {sys.executable} job.py --check", file=sys.stderr)
        return 1
    print(f"\nA check trains on {options.max_batches} batches per site: the accuracy above says nothing yet")
    print(f"CHECK PASSED in {time.monotonic() - START:.0f} s: one round, {options.n_clients} sites, {options.dataset}")
    return 0


if __name__ == "__main__":
    code = exit_code("job.py", main)
    sys.stdout.flush()
    os._exit(code)  # to take PyTorch's modules apart one by one, as sys.exit does, lasts two seconds
