"""Resume a run from its last global model, also one that was stopped or failed: `--resume RUN`."""

import dataclasses
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation.errors import UserError
from federation.run import schema
from federation.run.folder import RunFolder
from settings import Options

if TYPE_CHECKING:  # importing Lightning takes seconds
    from federation.launch.distribution import Distribution

RESTARTS = {  # state that is not resumed
    "scaffold": "the control variates restart at zero",
    "fedopt": "the server's momentum restarts at zero",
}


@dataclass(frozen=True)
class Start:
    """What a run starts from: new weights, unless it resumes another run."""

    run: str | None = None  # the name of the resumed run
    model: Path | None = None  # its last global model
    first_round: int = 0  # the number of rounds behind that model
    planned_rounds: int = 0  # rounds that a learning-rate schedule was meant to span
    left: int | None = None  # of an unfinished run: its rounds that are left
    settings: dict[str, Any] = field(default_factory=dict)  # options that are inherited
    stages: list[dict[str, Any]] = field(default_factory=list)  # how the model was trained: see run/schema.py

    @classmethod
    def read(cls, name: str) -> "Start":
        """Read a finished run, or one that was stopped or failed after a round.

        Raises:
            UserError: there is no such run.
        """
        try:
            folder = RunFolder.find(name, unfinished=True)
            result = schema.read(folder)
        except UserError as error:
            raise UserError(f"--resume {name}: {error}") from None
        settings = {name: result[name] for name in schema.CONFIGURATION if result.get(name) is not None}
        model, left = folder.path / (result.get("model") or ""), None
        if result["state"] == "finished":
            first_round, stages = result["rounds"][-1]["round"], schema.stages(result)
        else:
            if result["state"] == "running":
                raise UserError(f"--resume {name}: it is still running: wait, or stop it with Ctrl-C")
            if not (first_round := folder.keep_last()):
                raise UserError(f"--resume {name}: no round of it has finished: start it again")
            began = (result["resumed"] or {"round": 0})["round"]
            model, left = folder.last, began + result["num_rounds"] - first_round
            stages = [*(result["stages"] or []), schema.stage(result, first_round - began)]
            settings["num_rounds"] = max(left, 1)
        return cls(
            run=folder.name,
            model=model,
            first_round=first_round,
            planned_rounds=result["total_rounds"] or first_round,
            left=left,
            settings=settings,
            stages=stages,
        )

    @property
    def resumed(self) -> dict[str, Any] | None:
        """For results.json: which run is resumed, and after which of its rounds."""
        return {"run": self.run, "round": self.first_round} if self.run else None

    def check(self, options: Options, distribution: "Distribution") -> None:
        """Check that the sites have the same images as before and that the earlier model still loads.

        Raises:
            UserError: a check failed.
        """
        from trainer import load_model

        if self.model is None:
            return
        try:
            before: Any = schema.read_json(self.model.with_name("partition.json"))
            now = json.loads(json.dumps(dataclasses.asdict(distribution)))
            if options.env == "prod":  # only the classes are known: real sites manage their own images
                before, now = before.get("classes"), now["classes"]
            if before != now:
                raise UserError("its sites had different images: use the same --data_root")
            load_model(self.model, options)
        except UserError as error:
            raise UserError(f"--resume {self.run}: {error}") from None

    def copy_ledgers(self, run: RunFolder) -> None:
        """Let the simulated sites continue their ledgers."""
        if self.model and (before := RunFolder(self.model.parent).ledger).exists():
            shutil.copytree(before, run.ledger)

    def notes(self, options: Options) -> list[str]:
        """Messages for the user: which state restarts, and how the learning-rate schedule has changed, if it has."""
        if not self.run:
            return []
        restarts = RESTARTS.get(options.algorithm, "the sites' optimizers start fresh in every round anyway")
        notes = [f"resuming runs/{self.run} after round {self.first_round}", restarts]
        if options.total_rounds != self.planned_rounds:
            notes.append(f"a learning-rate schedule now spans {options.total_rounds} rounds, not {self.planned_rounds}")
        return notes
