"""The answers given when this project was made, and every other default. Change them here.

Only what is run on this machine reads this file; it is never sent to a site.
"""

PROJECT_NAME = "{{ cookiecutter.project_name | replace('\\', '\\\\') | replace('"', '\\x22') }}"  # noqa: E501

DATASET = "{{ cookiecutter.dataset }}"  # cifar10, fashion_mnist, bloodmnist, digits or image_folder
IMAGE_SIZE = 32  # pixels; every image is brought to this width and height
N_CLIENTS = {{ cookiecutter.num_clients | int }}  # sites
PARTITION = "iid"  # how a simulation deals images to sites: iid, dirichlet, shards or none
ALPHA = 0.5  # of dirichlet: the smaller, the less alike the sites
SHARDS_PER_SITE = 2  # of shards

MODEL = "LitNet"  # a LightningModule of model.py
ALGORITHM = "fedavg"  # fedavg, fedprox, scaffold or fedopt
FEDPROX_MU = 0.01  # of fedprox: how strongly a site is pulled to the global model
SERVER_LEARNING_RATE = 1.0  # of fedopt
SERVER_MOMENTUM = 0.9  # of fedopt

NUM_ROUNDS = {{ cookiecutter.rounds | int }}
LOCAL_EPOCHS = 1  # passes over a site's training images in a round
BATCH_SIZE = 16
LEARNING_RATE = 0.01
SEED = 0
SITE_TIMEOUT = 86_400.0  # seconds that a site may take for a round before the job goes on without it; not simulated
TRACKING = "none"  # experiment tracker: none, tensorboard, mlflow or wandb
USE_GPU = {{ cookiecutter.use_gpu }}
