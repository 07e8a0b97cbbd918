"""DP-SGD (Abadi et al. 2016, "Deep Learning with Differential Privacy") for a LightningModule, with Opacus.

Imported only for `--dp_epsilon`, because Opacus is optional.
"""

import copy
import os
import warnings
import zlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from opacus.validators import ModuleValidator
from pytorch_lightning import Callback, LightningModule
from torch.utils.data import DataLoader, Sampler

from federation.site.budget import Plan
from settings import Options


class SystemRandom:
    """The two methods of a numpy generator that are used here, from the operating system's randomness.

    Neither a seed nor the state of a generator could be guessed from what leaves the site.
    """

    def random(self, n: int) -> np.ndarray:
        """float64 (n,), uniform in [0, 1)."""
        return (np.frombuffer(os.urandom(8 * n), np.uint64) >> np.uint64(11)) * 2.0**-53

    def standard_normal(self, n: int) -> np.ndarray:
        """float64 (n,), by the method of Box and Muller."""
        half = (n + 1) // 2
        radius, angle = np.sqrt(-2 * np.log1p(-self.random(half))), 2 * np.pi * self.random(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]


def randomness(options: Options, site: str, round_: int) -> Any:
    """The source of noise and samples. In a simulation it is seeded, and so protects nothing."""
    if options.env == "sim":
        return np.random.default_rng((options.seed, zlib.crc32(site.encode()), round_))
    return SystemRandom()


class PoissonBatches(Sampler[list[int]]):
    """Batches that contain each of `n` images with probability `rate`, independently.

    An empty batch is replaced by one image, so that no model ever sees an empty one; `is_empty` has one entry per
    batch. `DPSGD` removes that image's gradient.
    """

    def __init__(self, n: int, rate: float, n_batches: int, random: Any) -> None:
        self.n, self.rate, self.n_batches, self.random = n, rate, n_batches, random
        self.is_empty: list[bool] = []

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[list[int]]:
        self.is_empty = []
        for _ in range(self.n_batches):
            chosen = np.flatnonzero(self.random.random(self.n) < self.rate).tolist()
            self.is_empty.append(not chosen)
            yield chosen or [0]


class ImageGradients(GradSampleHooks):
    """Opacus' gradients of single images; for images with channels last, Opacus 1.6 computes those of weights wrong."""

    def capture_activations_hook(self, module: Any, forward_input: Any, forward_output: Any) -> None:
        super().capture_activations_hook(module, [part.contiguous() for part in forward_input], forward_output)


class NoisySteps(DPOptimizer):
    """Opacus' optimizer with the noise of `random`: torch's generators have a seed of 32 bits, which can be guessed."""

    random: Any = None

    def add_noise(self) -> None:
        for parameter in self.params:
            drawn = torch.from_numpy(self.random.standard_normal(parameter.numel()))
            noise = (drawn * (self.noise_multiplier * self.max_grad_norm)).to(parameter).view_as(parameter)
            parameter.grad = parameter.summed_grad.view_as(parameter) + noise


class DPSGD(Callback):
    """Makes a `fit` differentially private: Poisson samples, clipped gradients of single images, noise.

    Args:
        plan: rate, number of steps, noise and clip.
        random: source of samples and noise.
    """

    def __init__(self, plan: Plan, random: Any) -> None:
        self.plan, self.random = plan, random

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.accumulate_grad_batches != 1 or not pl_module.automatic_optimization:
            raise ValueError("DP-SGD needs automatic optimization without accumulated gradients")
        usual = trainer.datamodule.train_dataloader()
        n, n_batches = len(usual.dataset), self.plan.steps // trainer.max_epochs
        self.batches = PoissonBatches(n, self.plan.rate, n_batches, self.random)
        loader = DataLoader(usual.dataset, batch_sampler=self.batches, collate_fn=usual.collate_fn)
        trainer.datamodule.train_dataloader = lambda: loader

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.hooks = ImageGradients(pl_module, loss_reduction="mean")
        expected = round(self.plan.rate * self.batches.n)
        private = NoisySteps(
            optimizer,
            noise_multiplier=self.plan.noise,
            max_grad_norm=self.plan.clip,
            expected_batch_size=expected,
        )
        private.random = self.random
        trainer.optimizers = [private]

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.is_empty = self.batches.is_empty[batch_idx]

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.is_empty:
            parameter: Any
            for parameter in filter(lambda each: each.requires_grad, pl_module.parameters()):
                parameter.grad_sample = torch.zeros_like(parameter.grad_sample)

    def on_fit_end(self, trainer: Any, pl_module: LightningModule) -> None:
        self.hooks.remove_hooks()


def first_images(loader: Any, n: int = 4) -> Any:
    """A batch of a loader's first images."""
    dataset, places = loader.dataset, [*range(min(n, len(loader.dataset)))]
    found = dataset.__getitems__(places) if hasattr(dataset, "__getitems__") else [dataset[place] for place in places]
    return loader.collate_fn(found)


def unfit(model: LightningModule, batch: Any) -> str | None:
    """Why a model cannot be trained with DP-SGD, found with trial steps on a few images; None if it can.

    The gradient of each image must be known, must add up to that of the batch, and must depend neither on the other
    images of the batch nor on their number.

    Args:
        model: not yet attached to a trainer; stays as it is.
        batch: images and labels, at least two of each.
    """
    if errors := ModuleValidator.validate(model, strict=False):
        return str(errors[0]).splitlines()[0]
    other = [torch.cat([part[:-1], part[:1]]) for part in batch]  # the last image replaced by the first
    try:
        gradients, sums, changed = _trial(model, batch)
        others, _, _ = _trial(model, other)
        # Without augmentation and dropout, which draw other numbers for another number of images.
        all_of_them, _, _ = _trial(model, batch, random=False)
        one_less, _, _ = _trial(model, [part[:-1] for part in batch], random=False)
    except Exception as error:  # whatever model.py, Opacus and PyTorch raise
        return f"a trial step failed with {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if changed:
        return f"training changes {changed[0]} without the optimizer"
    for name, own in gradients.items():
        if own is None:
            return f"the gradient of {name} is not known for each image"
        if not _equal(own.mean(dim=0), sums[name]):
            return f"the gradients of single images do not add up to that of the batch at {name}"
        if not _equal(own[:-1], others[name][:-1]) or not _equal(all_of_them[name][:-1], one_less[name]):
            return f"the gradient of an image depends on the other images of its batch at {name}"
    return None


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors differ by rounding errors only."""
    return bool((a - b).norm() <= 1e-3 * b.norm() + 1e-6)


def _trial(model: LightningModule, batch: Any, random: bool = True) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Gradients of a training step by image, those of the batch, and which entries of the state it changed."""
    model = copy.deepcopy(model).to(batch[0].device).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.train(random)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = ImageGradients(model, loss_reduction="mean")
    model.zero_grad()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `self.log` has no trainer here
        torch.manual_seed(0)
        model.trainer = SimpleNamespace(training=random)  # type: ignore[assignment]
        batch = model.on_after_batch_transfer(batch, 0)
        model.trainer = None
        loss: Any = model.training_step(batch, 1)
        (loss["loss"] if isinstance(loss, dict) else loss).backward()
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = {name: getattr(parameter, "grad_sample", None) for name, parameter in learned.items()}
    sums = {name: parameter.grad for name, parameter in learned.items()}
    hooks.remove_hooks()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    return gradients, sums, changed
