"""job.py's command line: a flag for each option in settings.py, and the checks before anything starts."""

import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from click.core import ParameterSource

from federation.errors import UserError
from federation.launch.model_file import model_names
from federation.launch.resume import Start
from federation.run import folder
from settings import FIXED, Options

PROJECT = Path(__file__).resolve().parents[2]
UNSUPPORTED_PATH = r"[\s'\"\\#]"  # in a project's path: NVFlare's simulator or POC would fail late
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"  # of a run or a site
MAX_NAME = 100  # characters in a run's name; files named after it have longer names
RULES = {each.name: each.metadata for each in fields(Options)}
FLAGS = {  # option -> its flag
    name: f"--{name if rules['flag'] is ... else rules['flag']}" for name, rules in RULES.items() if rules["flag"]
}


class Command(click.Command):
    """A program's command line, with a heading in its help for each group of options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                group = RULES[parameter.name]["group"] if parameter.name in FLAGS else "options"
                groups.setdefault(group, []).append(record)
        for group, records in groups.items():
            with formatter.section(group.capitalize()):
                formatter.write_dl(records)


def read_arguments(command: click.Command, arguments: list[str] | None = None, **defaults: Any) -> click.Context:
    """Parse a program's arguments; `--help` exits.

    Args:
        command: the command line to parse.
        arguments: None means this process's arguments.
        defaults: override the command's own defaults.

    Raises:
        UserError: an unknown flag, with the closest known one, or an invalid value.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return command.make_context(command.name, given, default_map=defaults, max_content_width=100)
    except click.exceptions.Exit as end:
        sys.exit(end.exit_code)
    except click.UsageError as error:
        message = error.format_message().rstrip(".")
        raise UserError(f"{message}; python {command.name} --help lists the flags") from None


def parse(arguments: list[str] | None = None) -> tuple[Options, Start]:
    """The checked options of a run, and what it starts from.

    Raises:
        UserError: the first error found.
    """
    purpose = "Train one image classifier across sites that never share their images. Defaults are in settings.py."
    command = Command("job.py", params=[_flag(name) for name in FLAGS], help=purpose)
    context = read_arguments(command, arguments)
    start = Start()
    if context.params["resume"] is not None:
        start = Start.read(context.params["resume"])
        context = read_arguments(command, arguments, **start.settings)
    given = {name for name in FLAGS if context.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    values = context.params
    for name in given:
        if RULES[name].get("resume") == FIXED and values[name] != start.settings.get(name, values[name]):
            was = f"{FLAGS[name]} is {values[name]}, but {start.settings[name]} in runs/{start.run}"
            raise UserError(f"{was}: a resumed run keeps its data, sites, seed and algorithm")
    values["site_names"] = (values["site_names"] or "").split(",") if values["site_names"] else []
    if start.run:
        values["resume"] = start.run
    options = Options(**values)
    _check(options, given, start)
    return options, start


def _flag(name: str) -> click.Option:
    """The flag of an option, according to its line in settings.py."""
    rules, default, flag = RULES[name], getattr(Options, name, None), FLAGS[name]
    types = get_type_hints(Options)[name]
    kind = next((each for each in (types, *get_args(types)) if each in (int, float, bool)), str)
    details: dict[str, Any] = {"type": kind}
    if "choices" in rules:
        details = {"type": click.Choice(rules["choices"])}
    elif kind in (int, float):
        lowest, highest = rules.get("least", rules.get("above")), rules.get("most", rules.get("below"))
        number = click.IntRange if kind is int else click.FloatRange
        if lowest is not None:
            details["type"] = number(lowest, highest, min_open="above" in rules, max_open="below" in rules)
        details["metavar"] = "N" if kind is int else "X"
    elif kind is bool:
        details = {"is_flag": True}
        flag += "" if rules.get("local") else f"/--no-{flag[2:]}"  # options of the run may default to true
    if "metavar" in rules:
        details["metavar"] = rules["metavar"]
    if "env" in rules:
        default = os.environ.get(rules["env"]) or default
    elif kind is not bool and default is not None:
        details["show_default"] = True
    users = f"{', '.join(rules['algorithms'])}: " if "algorithms" in rules else ""
    return click.Option([name, flag], default=default, help=users + rules["help"], **details)


def _check(options: Options, given: set[str], start: Start) -> None:
    """Reject invalid options and resolve dependent ones; `given` names the options on the command line."""
    for name in sorted(given):
        users = RULES[name].get("algorithms", (options.algorithm,))
        if options.algorithm not in users:
            raise UserError(
                f"{FLAGS[name]} is a flag of {' and '.join(users)}: --algorithm {options.algorithm} does not use it"
            )
        if isinstance(value := getattr(options, name), float) and not math.isfinite(value):
            raise UserError(f"{FLAGS[name]} is {value}: it must be a finite number")
    if start.left == 0 and "num_rounds" not in given:
        done = f"runs/{start.run} has finished all its {start.first_round} rounds, but not the final evaluation"
        raise UserError(f"--resume {start.run}: {done}: add --num_rounds 1 to train one more")
    last_round = start.first_round + options.num_rounds
    if options.total_rounds is None:  # training longer than planned stretches the schedule
        options.total_rounds = max(start.planned_rounds, last_round)
    if options.total_rounds < last_round:
        raise UserError(
            f"--total_rounds is {options.total_rounds}: it must be {last_round} or more, because this run ends there"
        )
    if options.resume is not None and options.check:
        raise UserError("--check does not resume a run: remove --resume")
    if options.model_class not in (known := model_names(PROJECT / "model.py")):
        raise UserError(f"--model is {options.model_class!r}: model.py has {', '.join(known) or 'no LightningModule'}")
    _check_name(options)
    if re.search(UNSUPPORTED_PATH, str(PROJECT)):
        reason = "NVFlare does not run in paths with spaces, quotes, \\ or #"
        raise UserError(f"{reason}: move the project out of {str(PROJECT)!r}")
    own_roots = "{site}" in (options.data_root or "")
    if not options.simulated or own_roots:  # each site has its own images
        if "partition" in given and options.partition != "none":
            why = "with {site}, each site has its own" if own_roots else "real sites have their own: use none"
            raise UserError(f"--partition {options.partition} splits one data set, but {why}")
        options.partition = "none"
    _check_privacy(options, given)
    if options.leak_test is None:
        options.leak_test = options.env == "sim"
    _check_environment(options, given)
    _check_numbers(options, given)
    if options.data_root:
        options.data_root = os.path.abspath(os.path.expanduser(options.data_root))
    if options.tracking != "none" and importlib.util.find_spec(options.tracking) is None:
        raise UserError(
            f"--tracking {options.tracking} needs a package: {sys.executable} -m pip install {options.tracking}"
        )


def _check_privacy(options: Options, given: set[str]) -> None:
    """Reject what differential privacy does not go with."""
    if options.dp_epsilon is None:
        if missing := {"dp_delta", "dp_clip"} & given:
            raise UserError(f"{FLAGS[min(missing)]} is for differential privacy: add --dp_epsilon")
        return
    if options.algorithm == "fedprox":
        raise UserError("--dp_epsilon would silently switch off FedProx's term: choose another --algorithm")
    if options.tracking != "none":
        raise UserError(f"--tracking {options.tracking} sends exact metrics during training: remove it or --dp_epsilon")
    if importlib.util.find_spec("opacus") is None:
        raise UserError(f"--dp_epsilon needs a package: {sys.executable} -m pip install 'opacus>=1.6'")


def _check_name(options: Options) -> None:
    name = options.name
    if name is None:
        if options.overwrite:
            raise UserError("--overwrite replaces a run: name it with --name")
        return
    if not re.fullmatch(NAME, name):
        raise UserError(f"--name is {name!r}: use only letters, digits, '.', '_' and '-', letter or digit first")
    if len(name) > MAX_NAME:
        raise UserError(f"--name has {len(name)} characters: it must have {MAX_NAME} or fewer")
    if name == "latest":
        raise UserError("--name latest is reserved for the link to the newest run: choose another name")
    if (PROJECT / folder.RUNS / name).exists():
        if not options.overwrite:
            raise UserError(f"runs/{name} exists: choose another --name, or add --overwrite to replace it")
        if name == options.resume:
            raise UserError(f"--resume {options.resume} needs runs/{name}: choose another --name")


def _check_numbers(options: Options, given: set[str]) -> None:
    """Reject more hosts or sites than there are; in settings.py or inherited, such a number means all."""
    if options.env == "prod" and {"n_hosts", "debug"} & given:
        flag = FLAGS["n_hosts" if "n_hosts" in given else "debug"]
        raise UserError(f"{flag} is for a simulation on this machine: remove it, or --env prod")
    if options.env == "prod":
        options.host_names = options.site_names if options.simulate else []
        options.n_hosts = len(options.host_names) or None
        if len(options.host_names) > options.n_clients:
            raise UserError(f"--n_clients is {options.n_clients}, but {len(options.host_names)} real sites run them")
    for name in ("n_hosts", "sites_per_round", "evaluate_sites"):
        if (value := getattr(options, name)) and value > options.n_clients:
            if name in given:
                raise UserError(f"{FLAGS[name]} is {value}, but there are only {options.n_clients} sites")
            setattr(options, name, None)
    if options.debug:
        names = [f"site-{i}" for i in range(1, options.n_clients + 1)]
        if options.debug not in names:
            raise UserError(f"--debug is {options.debug!r}: the sites are {names[0]} to {names[-1]}")


def _check_environment(options: Options, given: set[str]) -> None:
    """Reject options that real sites cannot use, and resolve the sites' and the submitter's names."""
    if options.env == "sim" and "site_timeout" in given:
        raise UserError("--site_timeout has no effect in the simulator: add --env poc or --env prod")
    if options.env != "prod":
        for name in sorted(given - {"site_timeout"}):
            if RULES[name]["group"] == "real sites":
                raise UserError(f"{FLAGS[name]} is for real sites: add --env prod")
        return
    if options.check or options.prepare_only:
        raise UserError("--check and --prepare_only run on this machine: remove --env prod")
    if options.data_root:
        raise UserError("each site sets its own FL_DATA_ROOT: remove --data_root and unset FL_DATA_ROOT here")
    if options.skip_unreadable:
        raise UserError("each site sets its own FL_SKIP_UNREADABLE: remove --skip_unreadable and unset it here")
    names = options.site_names = options.site_names or _sites_of_project()
    if invalid := [name for name in names if not re.fullmatch(NAME, name)]:
        raise UserError(f"--sites has the name {invalid[0]!r}: expected names separated by commas, without spaces")
    if len(set(names)) < len(names):
        raise UserError(f"--sites names {max(names, key=names.count)} twice")
    if options.simulate and options.dataset == "image_folder":
        raise UserError("--simulate partitions a public data set: image_folder would be the real sites' own images")
    if not options.simulate:
        options.n_clients = len(names)
    if options.dataset == "image_folder" and not options.classes_file:
        raise UserError("--classes FILE is missing: a file with one class per line, named like the sites' folders")
    if options.classes_file and not Path(options.classes_file).is_file():
        raise UserError(f"--classes: {options.classes_file} does not exist")
    for name in ("classes_file", "export", "startup_kit"):  # relative to the user's folder, not the project's
        if getattr(options, name):
            setattr(options, name, os.path.abspath(os.path.expanduser(getattr(options, name))))
    if options.export:
        if os.path.exists(options.export):
            raise UserError(f"--export: {options.export} exists: choose another folder")
        return
    if not options.startup_kit:
        raise UserError("--startup_kit DIR is missing: the folder that you received, with startup/ in it")
    kit = Path(options.startup_kit, "startup", "fed_admin.json")
    if not kit.is_file():
        raise UserError(f"--startup_kit: {kit} does not exist: use a submitter's kit, the folder with startup/ in it")
    try:
        submitter = json.loads(kit.read_text(encoding="utf-8"))["admin"]["username"]
    except (OSError, ValueError, KeyError, TypeError):
        fault = f"{kit} does not name a submitter: unpack the kit again"
        raise UserError(f"--startup_kit: {fault}") from None
    options.username = options.username or submitter


def _sites_of_project() -> list[str]:
    import yaml

    try:
        project = yaml.safe_load((PROJECT / "deploy" / "project.yml").read_text(encoding="utf-8"))
        return [member["name"] for member in project["participants"] if member["type"] == "client"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the sites from deploy/project.yml ({error}): name them with --sites") from None
