"""The benchmarks' images, and a freshly rendered project that converts them."""

import compileall
import hashlib
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


class Project:
    """A freshly rendered project, its modules compiled as after a first run.

    Args:
        build: receives the project and a separate cache; the user's cache is not touched.
    """

    def __init__(self, build: Path):
        self.folder = build / "project"
        shutil.rmtree(self.folder, ignore_errors=True)
        answers = {"project_slug": "project", "dataset": "image_folder", "setup": "skip"}
        cookiecutter(str(HERE.parent), no_input=True, output_dir=str(build), extra_context=answers, accept_hooks=False)
        self.environment = os.environ | {"XDG_CACHE_HOME": str(build / "cache")}
        compileall.compile_dir(self.folder, quiet=1)
        digest = hashlib.sha256()
        for file in sorted(self.folder.rglob("*.py")):
            digest.update(file.read_bytes())
        self.version = digest.hexdigest()[:12]

    def prepare(self, images: Path) -> Path:
        """Convert a folder of images as the project does. Returns the folder of converted images."""
        code = "import sys; from pathlib import Path; from federation.site.catalog import prepare; "
        code += "print(prepare('image_folder', Path(sys.argv[1]), 32))"
        command = [sys.executable, "-c", code, str(images)]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, check=True)
        return Path(done.stdout.decode().strip())
