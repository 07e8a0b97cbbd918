"""Differential privacy at a site: clipped gradients, noise, Poisson samples, what they spend, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("opacus")

from data import SiteDataModule
from federation.errors import Declined
from federation.protocol import DP
from federation.site.budget import Plan, epsilon, make_plan, noise_for, private, spent
from federation.site.dp import DPSGD, PoissonBatches, SystemRandom, first_images, randomness, unfit
from model import LitNet
from trainer import make_model, make_trainer

N = 40  # training images


class Sample:
    """Draws all images but some, and no noise."""

    def __init__(self, without):
        self.without = list(without)

    def random(self, n):
        drawn = np.zeros(n)
        drawn[self.without] = 1.0
        return drawn

    def standard_normal(self, n):
        return np.zeros(n)


@pytest.fixture
def step(options):
    """step(random, noise, clip): the change of all weights in a step of DP-SGD, times the batch size."""

    def run(random, noise=0.0, clip=1.0, n_steps=1, learning_rate=0.01):
        settings = options(n_clients=1, batch_size=N // 2, learning_rate=learning_rate)
        data = SiteDataModule("site-1", settings)
        data.setup()
        train = data.parts["train"]
        train.rows, train.labels = train.rows[:N], train.labels[:N]
        torch.manual_seed(0)
        model = make_model(settings)
        before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        plan = Plan(rate=0.5, steps=n_steps, noise=noise, clip=clip, epsilon=1.0, delta=1e-3, seeded=False)
        make_trainer(settings, 1, [DPSGD(plan, random)]).fit(model, datamodule=data)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        return (after - before) / learning_rate * N / 2

    return run


@pytest.mark.parametrize("clip", [0.1, 1.0])
def test_one_image_changes_a_step_by_at_most_the_clip(step, clip):
    whole = step(Sample([]), clip=clip)
    changes = [(step(Sample([image]), clip=clip) - whole).norm().item() for image in (0, 7, 23)]
    assert max(changes) <= clip * 1.001
    assert max(changes) > clip / 2  # untrained, gradients are longer than that


def test_the_noise_has_the_spread_of_the_plan(step, monkeypatch):
    """On an empty batch, a step is noise alone; and it does not crash."""
    random = SystemRandom()
    empty = Sample(range(N))
    monkeypatch.setattr(empty, "standard_normal", random.standard_normal)
    change = step(empty, noise=1.5, clip=0.2)
    assert len(change) == 62_006 and torch.isfinite(change).all()
    assert change.std().item() == pytest.approx(1.5 * 0.2, rel=0.02)
    assert abs(change.mean().item()) < 4 * 0.3 / math.sqrt(len(change))
    assert step(Sample(range(N)), noise=1.5).abs().max() == 0  # nothing of the image that stands in


def test_a_run_of_empty_batches_is_finite(step):
    change = step(Sample(range(N)), n_steps=60)
    assert torch.isfinite(change).all()


@pytest.mark.parametrize("random", [SystemRandom(), np.random.default_rng(0)], ids=["system", "seeded"])
def test_each_image_is_drawn_independently_with_the_same_probability(random):
    n, rate, n_batches = 200, 0.05, 4000
    batches = PoissonBatches(n, rate, n_batches, random)
    counts, sizes = np.zeros(n), []
    for batch in batches:
        size = 0 if batches.is_empty[-1] else len(batch)
        sizes.append(size)
        counts[batch[:size]] += 1
    assert len(sizes) == n_batches == len(batches)
    error = math.sqrt(rate * (1 - rate) / n_batches)
    assert np.abs(counts / n_batches - rate).max() < 5 * error
    assert np.mean(sizes) == pytest.approx(n * rate, rel=0.05)
    assert np.var(sizes) == pytest.approx(n * rate * (1 - rate), rel=0.15)


def test_the_systems_randomness_is_uniform_and_normal():
    from scipy.stats import kstest  # type: ignore[import-untyped]

    random = SystemRandom()
    assert kstest(random.random(50_000), "uniform").pvalue > 1e-6
    assert kstest(random.standard_normal(50_001), "norm").pvalue > 1e-6
    assert len(random.standard_normal(7)) == 7


def test_only_a_simulations_noise_follows_from_the_seed(options):
    drawn = {
        env: [randomness(options(env=env), "site-1", 0).standard_normal(3).tolist() for _ in range(2)]
        for env in ("sim", "poc", "prod")
    }
    assert drawn["sim"][0] == drawn["sim"][1]
    assert drawn["poc"][0] != drawn["poc"][1] and drawn["prod"][0] != drawn["prod"][1]


def test_epsilon_is_no_more_than_published_and_that_of_opacus():
    """Abadi et al. 2016, section 3.2: q = 0.01, σ = 4, 10,000 steps, δ = 1e-5: ε = 1.26, with a looser conversion."""
    from opacus.accountants import RDPAccountant

    assert 0.9 < epsilon(((4.0, 0.01, 10_000),), 1e-5) <= 1.26
    accountant = RDPAccountant()
    for noise, rate, steps in ((1.1, 0.02, 30), (0.9, 0.05, 20)):
        for _ in range(steps):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    assert epsilon(((1.1, 0.02, 30), (0.9, 0.05, 20)), 1e-5) == pytest.approx(accountant.get_epsilon(1e-5))


def test_the_noise_is_just_large_enough():
    noise = noise_for(3.0, 1e-4, 0.02, 500)
    assert 2.9 < epsilon(((noise, 0.02, 500),), 1e-4) <= 3.0


JOB = {"job": "b", "code": "c0de", "task": "train"}


def rounds(plan, n, job=JOB):
    """A ledger's records of n rounds."""
    spent = {"noise": plan.noise, "rate": plan.rate, "steps": plan.steps}
    return [{**job, "tensors": [{}], DP: spent} for _ in range(n)]


@pytest.fixture
def job(options):
    """job(**changes): the options of a job of 4 rounds with ε = 4."""
    return lambda **changes: options(**{"dp_epsilon": 4.0, "num_rounds": 4, "env": "poc", **changes})


def test_the_rounds_of_a_job_spend_what_the_submitter_wants(job):
    plan = make_plan(job(), 500, [], None, JOB)
    assert (plan.rate, plan.steps, plan.delta, plan.seeded) == (16 / 500, 32, 0.1 / 500, False)
    last = make_plan(job(), 500, rounds(plan, 3), None, JOB)
    assert plan.epsilon < last.epsilon and 3.9 < last.epsilon <= 4.0
    assert make_plan(job(), 5000, [], None, JOB).noise < plan.noise  # each image counts for less


def test_epsilon_covers_earlier_jobs_whatever_their_settings(job):
    before = rounds(make_plan(job(), 500, [], None, JOB), 4, {**JOB, "job": "a"})
    plan = make_plan(job(batch_size=50), 500, before, None, JOB)
    assert plan.epsilon > 4.0
    history = spent(before)
    assert history and plan.epsilon == epsilon((*history, (plan.noise, 0.1, 10)), plan.delta)


def test_answers_without_noise_leave_no_epsilon(job):
    plan = make_plan(job(), 500, [{**JOB, "tensors": [{}], DP: None}], None, JOB)
    assert plan.epsilon == math.inf
    counts: list[dict[str, Any]] = [{**JOB, "task": "validate", "tensors": [{}], DP: None}]  # exact, and not covered
    assert make_plan(job(), 500, counts, None, JOB).epsilon < 4


def test_a_job_that_would_exceed_the_sites_ceiling_is_refused_before_its_first_round(job):
    ours = make_plan(job(), 500, [], 4.0, JOB)  # just fits
    make_plan(job(), 500, rounds(ours, 3), 4.0, JOB)  # so does its last round
    other = rounds(ours, 1, {**JOB, "job": "a"})
    with pytest.raises(Declined, match=r"would bring ε to 4\.\d\d \(ε = \d\.\d\d is spent\), and FL_DP_EPSILON is 4"):
        make_plan(job(), 500, other, 4.0, JOB)
    with pytest.raises(Declined, match="would bring ε"):  # δ is the submitter's, but the ceiling's is the site's
        make_plan(job(dp_epsilon=4.5, dp_delta=0.0019), 500, [], 4.0, JOB)
    with pytest.raises(Declined, match="answers without differential privacy"):
        make_plan(job(), 500, [{**JOB, "tensors": [{}], DP: None}], 4.0, JOB)


def test_a_delta_that_would_give_an_image_away_is_refused(job):
    with pytest.raises(Declined, match="must be below 1 / 500"):
        make_plan(job(dp_delta=0.002), 500, [], None, JOB)


def test_a_site_with_a_ceiling_refuses_jobs_without_differential_privacy(options, monkeypatch):
    assert private("site-1", options(), None, None, None) == []
    monkeypatch.setenv("FL_DP_EPSILON", "4")
    with pytest.raises(Declined, match="requires differential privacy"):
        private("site-1", options(), None, None, None)


class Normalized(LitNet):
    def __init__(self, num_classes, options):
        super().__init__(num_classes, options)
        self.model.add_module("norm", torch.nn.BatchNorm2d(6))


class Centered(LitNet):
    def forward(self, x):
        return self.model(x - x.mean(dim=0))


class InPlace(LitNet):
    def forward(self, x):
        return torch.relu_(self.model.conv1(x)).mean(dim=(2, 3)) @ torch.ones(6, 10)


class Summed(LitNet):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * len(batch[1])


class Counting(LitNet):
    def __init__(self, num_classes, options):
        super().__init__(num_classes, options)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[1])
        return super().training_step(batch, batch_idx)


FAULTS = {
    Normalized: "BatchNorm",
    Centered: "depends on the other images",
    InPlace: "a trial step failed",
    Summed: "depends on the other images",  # on their number
    Counting: "changes seen without the optimizer",
}


@pytest.fixture
def batch(options):
    data = SiteDataModule("site-1", options())
    data.setup()
    return first_images(data.train_dataloader())


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_trial_step_finds_models_that_are_unfit(kind, batch, options):
    assert FAULTS[kind] in (unfit(kind(10, options()), batch) or "")


@pytest.mark.parametrize("name", ["LitNet", "LitResNet"])
def test_both_models_are_fit_also_with_channels_last(name, batch, options):
    images, labels = batch
    assert images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    assert unfit(make_model(options(model_class=name)), (images, labels)) is None


REFUSED = {
    ("--dp_epsilon", "8", "--algorithm", "fedprox"): "would silently switch off FedProx's term",
    ("--dp_epsilon", "8", "--tracking", "tensorboard"): "sends exact metrics during training",
    ("--dp_clip", "2"): "add --dp_epsilon",
    ("--dp_epsilon", "0"): "not in the range",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_what_does_not_go_with_it_is_refused_in_one_line(project, flags):
    run = project.run("job.py", *flags)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert REFUSED[flags] in run.stderr


@pytest.mark.slow
def test_two_pocs_with_one_seed_differ_and_two_simulations_do_not(project):
    import json

    hashes: dict = {"poc": set(), "sim": set()}
    for env, found in hashes.items():
        for number in (1, 2):
            flags = ("--dp_epsilon", "8", "--num_rounds", "1", "--n_hosts", str(number), "--name", f"{env}-{number}")
            run = project.run("job.py", "--env", env, *flags)
            assert run.returncode == 0, run.stderr
            result = json.loads((project.folder / "runs" / f"{env}-{number}" / "results.json").read_text())
            assert {own["seeded"] for own in result["privacy"].values()} == {env == "sim"}
            assert ("Simulated: no guarantee" in run.stdout) == (env == "sim")
            found.add(result["sha256"])
    assert {env: len(found) for env, found in hashes.items()} == {"poc": 2, "sim": 1}


@pytest.mark.slow
def test_the_submitter_is_told_which_site_refused_a_job_and_why(project):
    run = project.run("job.py", "--dp_epsilon", "8", "--num_rounds", "1", FL_DP_EPSILON="2")
    assert run.returncode == 1
    assert "site-1: it declined: the job would bring ε to" in run.stderr and "FL_DP_EPSILON is 2" in run.stderr
