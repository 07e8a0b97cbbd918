"""NVFlare's simulator with its FedAvg recipe, as its hello-lightning uses them; it has no final evaluation.

So this program tests the final model itself, on the test images of all sites.
"""

from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

import common
from common import N_SITES, OPTIONS, WORK, Batches
from nvflare_client import PeerNet


def main() -> None:
    recipe = FedAvgRecipe(
        name="peer",
        min_clients=N_SITES,
        num_rounds=OPTIONS.num_rounds,
        model=PeerNet(),
        train_script="nvflare_client.py",
        key_metric="val_acc",
    )
    recipe.execute(SimEnv(num_clients=N_SITES, num_threads=N_SITES, workspace_root=WORK["scratch"]))
    (saved,) = Path(WORK["scratch"]).rglob("FL_global_model.pt")
    net = PeerNet()
    net.load_state_dict(torch.load(saved, weights_only=True)["model"])
    tests = [Batches(site, "test") for site in range(N_SITES)]
    common.report(sum(common.evaluate(net, test) for test in tests) / sum(test.n_images for test in tests))


if __name__ == "__main__":
    main()
