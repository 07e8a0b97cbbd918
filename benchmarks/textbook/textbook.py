"""Run the project's job.py with NVFlare's default of 2 s between two requests of a site."""

import sys

import job
from federation.errors import exit_code
from federation.launch import recipes

NVFLARE_TASK_INTERVAL_S = 2.0

if __name__ == "__main__":
    if not hasattr(recipes, "TASK_INTERVAL_S"):
        sys.exit("federation/launch/recipes.py no longer has TASK_INTERVAL_S: update benchmarks/textbook/textbook.py")
    recipes.TASK_INTERVAL_S = NVFLARE_TASK_INTERVAL_S
    sys.exit(exit_code("job.py", job.main))
