"""Run a federation: `python job.py`. All flags: `python job.py --help`.

Options -> data -> recipe -> simulator, POC or sites -> `runs/<name>/` with the final model and `results.json`.
"""

import federation.launch.packages  # noqa: F401 (first: checks that the packages below are installed)

# isort: split
import dataclasses
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import RunError, UserError, exit_code, show
from federation.launch.model_file import check_model
from federation.launch.options import PROJECT, parse
from federation.launch.resume import Start
from federation.protocol import LEDGER_VARIABLE, write_json
from federation.run.folder import RunFolder
from settings import ALGORITHMS, Options

if TYPE_CHECKING:  # importing Lightning takes seconds
    from federation.launch.distribution import Distribution

STARTED = time.monotonic()


def main() -> int:
    options, start = parse()
    os.chdir(PROJECT)
    check_model(options.model_class)
    if options.check:
        return check(options)
    distribution = get_data(options)
    start.check(options, distribution)
    if options.debug:
        from federation.launch.debug import run_task

        run_task(options, start)
    elif options.export:
        export(options, distribution, start)
    elif options.prepare_only:
        print(f"{options.dataset} is ready")
    else:
        federate(options, distribution, start, RunFolder.create(options.name, options.overwrite))
    return 0


def get_data(options: Options) -> "Distribution":
    """Download and convert missing data, assign images to sites, and set `options.classes`."""
    from federation.launch import distribution

    if options.env == "prod":  # the images are at the sites
        found = distribution.Distribution(distribution.known_classes(options), {}, {})
    else:
        distribution.prepare(options)
        found = distribution.describe(options)
    options.classes = found.classes
    return found


def federate(options: Options, distribution: "Distribution", start: Start, run: RunFolder) -> dict[str, Any]:
    """Run the federation and return its result, also written to `results.json`.

    Raises:
        RunError: a site failed.
    """
    import torch

    import results
    from federation.launch import display, machine, recipes, simulator, tracking
    from federation.launch.distribution import notes as describe_images
    from federation.launch.nvflare_log import root_cause
    from federation.run import outcome, schema
    from federation.site.partition import hosts, site_names

    torch.set_num_threads(1)  # this process and the server do little: leave the cores to the clients
    has_gpu = torch.cuda.is_available()
    if has_gpu and not options.gpu:
        print("A GPU is available but not used: turn it on with --gpu")
    if options.gpu and not has_gpu:
        print("WARNING: --gpu was given, but no CUDA GPU is available: training on the CPU")
    if options.simulated:
        options.threads, options.n_hosts = machine.n_threads(options.n_clients), machine.n_hosts(options)
    record = {**schema.origin(), "resumed": start.resumed, "stages": start.stages}
    try:
        run.begin(record)
        write_json(run.partition, dataclasses.asdict(distribution))
        environment = tracking.environment(options.tracking, run)
        environment[LEDGER_VARIABLE] = str(run.ledger.resolve())
        write_job(options, distribution, start, run, environment)
        start.copy_ledgers(run)
    except BaseException:  # nothing has run, so free the name again
        shutil.rmtree(run.path)
        raise
    if distribution.counts:
        results.show_distribution(distribution.counts)
    print(
        f"\n{ALGORITHMS[options.algorithm]}, sites: {options.n_clients}, rounds: {options.num_rounds}, log: {run.log}"
    )
    for note in [*describe_images(options), *recipes.notes(options, run), *start.notes(options)]:
        print(note)

    launch = simulator.simulate
    if options.env == "poc":
        from federation.launch.poc import run_poc as launch
    elif options.env == "prod":
        from federation.launch.prod import submit as launch
    sites = site_names(options.n_clients) if options.simulated else options.site_names
    clients = [] if options.env == "prod" else list(hosts(options))
    try:
        with display.follow(run, clients, options.num_rounds, options.verbose, start.first_round) as follow:
            launch(run, options, environment, follow)
        collected = outcome.collect(run, options, sites)
    except RunError as error:
        raise RunError(outcome.failure(run, error, bool(root_cause(run.workspace)))) from None
    except KeyboardInterrupt:
        print(outcome.left_behind(run) or "no round had finished", file=sys.stderr)
        raise
    finally:
        tracking.collect(options.tracking, run)
    shared = collected.pop("counts")  # each real site decides whether to share them
    device = torch.cuda.get_device_name() if options.gpu and has_gpu else "cpu"
    result = schema.compose(options, collected, device, time.monotonic() - STARTED, record)
    try:  # before printing anything, so that no output error can lose the result
        write_json(run.results, result, indent=1)
        if shared:
            write_json(run.partition, dataclasses.asdict(dataclasses.replace(distribution, counts=shared)))
    except OSError as error:
        raise RunError(f"cannot write the results into {run.path}: {error.strerror}") from None
    run.point_latest()
    tracking.add_global_curves(options.tracking, run, result, environment)
    if shared:
        results.show_distribution(shared)
    results.show(result)
    print(f"results: {run.results}, model: {run.path}/{result['model']}")
    return result


def write_job(
    options: Options, distribution: "Distribution", start: Start, run: RunFolder, environment: dict[str, str]
) -> None:
    """Write the job, which is everything that the server and the sites get, to a run's folder."""
    from federation.launch import recipes, tracking

    recipe = recipes.build(options, distribution, start, run)
    tracking.add_tracking(recipe, options.tracking, run, environment)
    recipe.export(str(run.path))


def export(options: Options, distribution: "Distribution", start: Start) -> None:
    """Write the job for real sites to `options.export`, exactly as it would be submitted, for review or submission."""
    sys.argv = sys.argv[:1]  # NVFlare has its own --export and would warn
    from federation.launch import session, tracking

    # Not a run, but inside the project: NVFlare bundles only files with a relative path.
    with tempfile.TemporaryDirectory(prefix=".export-", dir=".") as folder:
        run = RunFolder(Path(os.path.relpath(folder)) / (options.name or Path(options.export or "").name))
        run.path.mkdir()
        write_job(options, distribution, start, run, tracking.environment(options.tracking, run))
        session.set_target_sites(run.job, options.site_names)
        try:
            shutil.copytree(run.job, options.export or "")
        except OSError as error:
            raise UserError(f"--export: cannot write {options.export}: {error}") from None
    print(f"Job exported. To submit it:\n  nvflare job submit -j {options.export} --startup-kit KIT")


def check(options: Options) -> int:
    """Run and check one short round, on digits if the chosen data is not available; return the exit code."""
    options.n_clients, options.num_rounds, options.local_epochs = min(options.n_clients, 4), 1, 1
    options.total_rounds = 1
    options.max_batches = 4
    options.n_hosts = options.sites_per_round = options.evaluate_sites = None
    try:
        try:
            distribution = get_data(options)
        except UserError as error:
            print(f"{error}\nChecking with digits instead.")
            options.dataset, options.partition, options.data_root = "digits", "iid", None
            distribution = get_data(options)
        run = RunFolder.create(options.name, options.overwrite)
        result = federate(options, distribution, Start(), run)
        from federation.run import outcome

        if fault := outcome.find_fault(run, result, options, list(distribution.sites)):
            raise RunError(f"{fault}\nFull log: {run.log}")
    except (UserError, RunError, OSError) as error:
        show(f"\nNOT VERIFIED: {error}\nTry again with: {sys.executable} job.py --check")
        return 1
    print(f"\nThe check trains on only {options.max_batches} batches per site: ignore its accuracy")
    print(
        f"CHECK PASSED in {time.monotonic() - STARTED:.0f} s: one round, {options.n_clients} sites, {options.dataset}"
    )
    return 0


if __name__ == "__main__":
    code = exit_code("job.py", main)
    sys.stdout.flush()
    os._exit(code)  # skip interpreter teardown, which takes 2 s with PyTorch
