"""The benchmark's images, and the three programs that it runs on them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from cookiecutter.main import cookiecutter
from PIL import Image

HERE = Path(__file__).resolve().parent
CLASSES = 10


def generate(folder: Path, per_class: dict[str, int]) -> Path:
    """Write learnable images of CIFAR-10's shape as PNG files, unless they exist.

    Each class has a smooth pattern of colors; an image is its class's pattern, shifted, with noise. Seeded.

    Args:
        folder: receives <split>/<class>/<number>.png.
        per_class: number of images per class in `train` and `test`.
    """
    if not folder.is_dir():
        random = np.random.default_rng(0)
        coarse = random.uniform(0, 255, (CLASSES, 4, 4, 3)).astype(np.uint8)
        patterns = [np.asarray(Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC), float) for c in coarse]
        unfinished = folder.with_name(f"{folder.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        for split, count in per_class.items():
            for label, pattern in enumerate(patterns):
                target = unfinished / split / f"class-{label}"
                target.mkdir(parents=True)
                for i in range(count):
                    moved = np.roll(pattern, random.integers(0, 32, 2), (0, 1))
                    pixels = 128 + 0.4 * (moved - 128) + random.normal(0, 50, moved.shape)
                    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                    image.save(target / f"{i:05}.png", compress_level=1)
        unfinished.rename(folder)
    return folder


def subset(source: Path, folder: Path, divisor: int) -> Path:
    """Make a folder of links to the first 1/divisor of each class's images."""
    shutil.rmtree(folder, ignore_errors=True)
    for split in ("train", "test"):
        for one in sorted(path for path in (source / split).iterdir() if path.is_dir()):
            (folder / split / one.name).mkdir(parents=True)
            files = sorted(one.iterdir())
            for path in files[: max(1, len(files) // divisor)]:
                (folder / split / one.name / path.name).symlink_to(path.resolve())
    return folder


class Programs:
    """Command lines of a freshly rendered project, its textbook copy and the plain loop.

    Args:
        build: receives the projects and a separate cache; the user's cache is not touched.
        batch_size, learning_rate: the same for all three.
    """

    def __init__(self, build: Path, batch_size: int, learning_rate: float):
        self.build, self.batch_size, self.learning_rate = build, batch_size, learning_rate
        self.environment = os.environ | {"XDG_CACHE_HOME": str(build / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        self.project, self.textbook = build / "project", build / "textbook"
        for folder in (self.project, self.textbook):
            shutil.rmtree(folder, ignore_errors=True)
        answers = {"project_slug": "project", "dataset": "image_folder", "setup": "skip"}
        cookiecutter(str(HERE.parent), no_input=True, output_dir=str(build), extra_context=answers, accept_hooks=False)
        shutil.copytree(self.project, self.textbook)
        (self.textbook / "data.py").rename(self.textbook / "images.py")
        for path in (HERE / "textbook").glob("*.py"):
            shutil.copy(path, self.textbook)

    def prepare(self, images: Path) -> Path:
        """Convert a folder of images as the project does. Returns the folder of converted images."""
        code = "import sys; from pathlib import Path; from federation.site.catalog import prepare; "
        code += "print(prepare('image_folder', Path(sys.argv[1]), 32))"
        command = [sys.executable, "-c", code, str(images)]
        done = subprocess.run(command, cwd=self.project, env=self.environment, stdout=subprocess.PIPE, check=True)
        return Path(done.stdout.decode().strip())

    def command(self, what: str, images: Path, rounds: int, n_clients: int, partition: str, seed: int) -> list[str]:
        """`what` is limit (the plain loop, which writes limit.json), project or textbook (runs named "run")."""
        options = ["--n_clients", n_clients, "--partition", partition, "--seed", seed]
        options += ["--batch_size", self.batch_size, "--learning_rate", self.learning_rate]
        if what == "limit":
            program = [HERE / "plain.py", "--project", self.project, "--store", self.prepare(images)]
            options += ["--rounds", rounds, "--output", self.build / "limit.json"]
        else:
            program = ["textbook.py" if what == "textbook" else "job.py", "--dataset", "image_folder"]
            options += ["--data_root", images, "--num_rounds", rounds, "--name", "run"]
            options += ["--n_hosts", n_clients]  # a process per client, like the plain loop: timeline.py relies on it
        return [sys.executable, *map(str, program), *map(str, options)]
