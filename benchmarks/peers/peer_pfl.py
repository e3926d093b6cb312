"""pfl-research, one process."""

import torch
from common import WORK, Rounds, client, setting, start_model
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

torch.set_num_threads(1)
rounds = Rounds()


class Model(torch.nn.Module):
    """The workload's model with the two methods that pfl asks for."""

    def __init__(self):
        super().__init__()
        self.inner = start_model()

    def forward(self, x):
        return self.inner(x)

    def loss(self, x, y, is_eval=False):
        return torch.nn.functional.cross_entropy(self.inner(x), y)

    def metrics(self, x, y, is_eval=False):
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


class Clock(TrainingProcessCallback):
    """Marks the rounds."""

    def on_train_begin(self, *, model):
        rounds.mark()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        rounds.mark()
        return False, Metrics()


def user(c):
    x, y = client(c)
    return Dataset([torch.from_numpy(x), torch.from_numpy(y)], user_id=str(c))


order = iter(WORK["cohorts"].ravel().tolist())
model = Model()
data = FederatedDataset(user, lambda: next(order))
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=len(WORK["cohorts"]),
        evaluation_frequency=10**9,
        train_cohort_size=WORK["cohorts"].shape[1],
        val_cohort_size=0,
    ),
    backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
    model=PyTorchModel(
        model, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(model.parameters(), lr=1.0)
    ),
    model_train_params=NNTrainHyperParams(
        local_num_epochs=setting("epochs"), local_learning_rate=setting("lr"), local_batch_size=setting("batch")
    ),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Clock()],
)
rounds.done([p.detach().numpy() for p in model.inner.parameters()])
