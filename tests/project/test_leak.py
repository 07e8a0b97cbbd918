"""The leak test: what the final model's loss gives away about a site's training images."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from data import SiteDataModule
from federation.protocol import LEAK_AUC, LEAK_IMAGES, LEAK_TPR
from federation.run import schema
from federation.site.leak import membership
from trainer import make_model


@pytest.fixture
def site(options):
    """site(n_steps): a model that trained so long on a few images with random labels, and the data of the site."""

    def make(n_steps, n_train=60):
        settings = options(n_clients=1, batch_size=n_train)
        data = SiteDataModule("site-1", settings)
        data.setup()
        rows = torch.arange(n_train).numpy()
        data.parts["train"].rows, data.parts["train"].labels = (
            values[rows] for values in (data.parts["train"].rows, data.parts["train"].labels)
        )
        torch.manual_seed(0)
        model = make_model(settings)
        if n_steps:  # nothing to learn but the images themselves
            data.parts["train"].labels = torch.randint(10, (n_train,)).numpy()
        batch, optimizer = next(iter(data.train_dataloader())), torch.optim.Adam(model.parameters(), 0.003)
        for step in range(1, n_steps + 1):  # 0 would log
            optimizer.zero_grad()
            model.training_step(batch, step % 50 or 1).backward()
            optimizer.step()
        return model, data

    return make


def test_a_model_that_memorized_its_training_images_is_found_out(site):
    model, data = site(n_steps=100)
    assert membership(model, data, seed=0)[LEAK_AUC] > 0.8


def test_the_share_found_is_that_at_one_percent_false_positives(site, monkeypatch):
    """A quarter of the training images have a smaller loss than any test image, the others the same as those."""
    model, data = site(n_steps=0, n_train=360)

    def scores(batch, index):
        labels = batch[1]
        batches.append(labels)
        known = torch.arange(len(labels)) < len(labels) / 4 * (labels is batches[0])
        return torch.nn.functional.one_hot(labels, 10) * torch.where(known, 5.0, 1.0)[:, None]

    batches: list = []
    monkeypatch.setattr(model, "predict_step", scores)
    assert membership(model, data, seed=0) == {LEAK_AUC: pytest.approx(0.625, abs=0.02), LEAK_TPR: 0.25}


def test_an_untrained_model_gives_nothing_away(site):
    model, data = site(n_steps=0, n_train=360)
    n = len(data.parts["test"])
    assert n == 360
    found = membership(model, data, seed=0)
    own = {"auc": found[LEAK_AUC], "tpr": found[LEAK_TPR]}
    result: dict = {"leak": {"site-1": own}, "images": {}}
    result["test"] = {"sites": {"site-1": {"images": n}}}
    ((images, auc, error, tpr),) = schema.leak(result).values()
    assert images == n and error == pytest.approx(0.0215, abs=1e-3)
    assert abs(auc - 0.5) < 3 * error and tpr < 0.05


def test_the_error_is_that_of_an_auc_by_chance():
    result: dict = {"leak": {"s": {"auc": 0.5, "tpr": 0.0}}, "images": {"s": {"train": 50}}}
    result["test"] = {"sites": {"s": {"images": 80}}}
    random = torch.Generator().manual_seed(0)
    labels = [1] * 50 + [0] * 50
    drawn = [roc_auc_score(labels, torch.rand(100, generator=random).numpy()) for _ in range(1000)]
    assert schema.leak(result)["s"][2] == pytest.approx(torch.tensor(drawn).std().item(), rel=0.08)


def test_only_some_images_are_used_and_the_seed_draws_them(site, monkeypatch):
    model, data = site(n_steps=0, n_train=1000)
    seen = []
    step = model.predict_step

    def counted(batch, index):
        seen.append(len(batch[1]))
        return step(batch, index)

    monkeypatch.setattr(model, "predict_step", counted)
    first = membership(model, data, seed=0)
    assert seen == [360, 360] and LEAK_IMAGES == 500
    assert membership(model, data, seed=0) == first != membership(model, data, seed=1)


def test_a_site_without_test_images_or_a_model_without_scores_is_left_out(site, monkeypatch):
    model, data = site(n_steps=0)
    monkeypatch.setattr(model, "predict_step", lambda batch, index: batch[1])
    assert membership(model, data, seed=0) == {}
    data.parts["test"].rows = data.parts["test"].rows[:0]
    assert membership(make_model(data.options), data, seed=0) == {}
