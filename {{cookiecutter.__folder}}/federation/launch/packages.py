"""Imported first for its side effect: exits with a one-line error if this Python lacks the project's packages."""

import importlib.util
import sys
from pathlib import Path

program, own = Path(sys.argv[0]).name, Path(__file__).resolve().parents[2] / ".venv"
needed = ["click", "pytorch_lightning", "rich", "torch", *(["nvflare"] if program == "job.py" else [])]
if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
    usable = (own / "bin" / "python").exists() and Path(sys.prefix) != own
    todo = f".venv/bin/python {program}" if usable else "python3 install.py"
    print(f"{program}: {sys.executable} has no {missing[0]}: use {todo}", file=sys.stderr)
    sys.exit(2)
