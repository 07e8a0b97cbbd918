"""Make the README's pictures from a real run: `.venv/bin/python docs/pictures.py PROJECT [FLAG ...]`.

Runs job.py of a rendered project on a terminal with these flags, which must include --num_rounds. Draws that terminal
in the middle of the run, then takes a screenshot of the run's report, which needs Chromium on the PATH.
"""

import io
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
COLUMNS, LINES = 92, 60
WIDTH, HEIGHT = 1120, 1500  # pixels: the top of the report, down to the images per site and class
NAMES = {"default": "", "brown": "yellow"}  # pyte's names of colors -> rich's


def record(project: Path, flags: list[str], round_: str) -> list[Text]:
    """Run job.py on a terminal, and return its screen while the sites trained in this round."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    terminal, programs_side = pty.openpty()
    command = [sys.executable, "job.py", *flags]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(COLUMNS), "LINES": str(LINES)}
    program = subprocess.Popen(command, cwd=project, env=environment, stdout=programs_side, stderr=programs_side)
    os.close(programs_side)
    running: list[Text] = []
    while True:
        try:
            new = os.read(terminal, 4096)
        except OSError:  # Linux: the program closed its side
            new = b""
        if not new:
            break
        stream.feed(new)
        shown = "\n".join(screen.display)
        if not running and round_ in shown and "training, step" in shown:
            running = lines_of(screen)
    if program.wait():
        sys.exit(
            f"pictures.py: job.py failed with exit code {program.returncode}; its screen:\n" + "\n".join(screen.display)
        )
    return running


def lines_of(screen: pyte.Screen) -> list[Text]:
    lines = []
    for number in range(screen.lines):
        line = Text()
        for column in range(screen.columns):
            char = screen.buffer[number][column]
            color = NAMES.get(char.fg, char.fg if char.fg.isalpha() else f"#{char.fg}")
            line.append(char.data, f"{'bold ' if char.bold else ''}{color}".strip())
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def draw(lines: list[Text], title: str, path: Path) -> None:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {title}", "bold"))
    for line in lines:
        console.print(line)
    console.save_svg(str(path), title="")


def screenshot(page: Path, path: Path) -> None:
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if not browser:
        sys.exit("pictures.py: Chromium is not on the PATH: no screenshot of the report")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", f"--user-data-dir={profile}", "--hide-scrollbars"]
        flags += [f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=10000", f"--screenshot={path}"]
        subprocess.run([browser, *flags, page.resolve().as_uri()], check=True, capture_output=True)


def main() -> None:
    project, flags = Path(sys.argv[1]), sys.argv[2:]
    rounds = int(flags[flags.index("--num_rounds") + 1])
    PICTURES.mkdir(exist_ok=True)
    running = record(project, flags, f"round {rounds // 2 + 1} of {rounds}")
    shown = [flag for flag in flags if not flag.startswith(("--data_root", "/"))]
    command = " ".join(["python job.py", *shown])
    draw(running, command, PICTURES / "running.svg")
    subprocess.run([sys.executable, "results.py", "--html"], cwd=project, check=True)
    screenshot((project / "runs" / "latest" / "report.html").resolve(), PICTURES / "report.png")


if __name__ == "__main__":
    main()
