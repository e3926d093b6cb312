"""Flower's simulation engine on Ray; it samples clients by itself."""

import os
import sys

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
HERE = os.path.dirname(os.path.abspath(__file__))
os.environ["PYTHONPATH"] = HERE
FILE = os.path.abspath(sys.argv[1])

from common import Rounds, setting, start_model  # noqa: E402
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

COHORT, CLIENTS, ROUNDS = setting("cohort"), setting("clients"), setting("rounds")
client_app, server_app = ClientApp(), ServerApp()
_kept = {}


@client_app.train()
def train(msg: Message, context: Context):
    import sys

    sys.argv = ["peer", FILE]
    import common
    import torch

    if not _kept:
        torch.set_num_threads(1)
        _kept["model"] = common.start_model()
    model = _kept["model"]
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    x, y = (torch.from_numpy(a) for a in common.client(int(context.node_config["partition-id"])))
    optimiser, batch = torch.optim.SGD(model.parameters(), lr=common.setting("lr")), common.setting("batch")
    for _ in range(common.setting("epochs")):
        for i in range(0, len(y), batch):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(model(x[i : i + batch]), y[i : i + batch]).backward()
            optimiser.step()
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(y)})})
    return Message(content, reply_to=msg)


@server_app.main()
def main(grid: Grid, context: Context):
    rounds, model = Rounds(), start_model()
    strategy = FedAvg(
        fraction_train=COHORT / CLIENTS + 1e-9, fraction_evaluate=0.0, min_available_nodes=CLIENTS, min_train_nodes=min(2, COHORT)
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=ROUNDS,
        evaluate_fn=lambda number, arrays: rounds.mark(),
    )
    rounds.done([v.numpy() for v in result.arrays.to_torch_state_dict().values()])


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2, "log_to_driver": False}}
    run_simulation(server_app=server_app, client_app=client_app, num_supernodes=CLIENTS, backend_config=resources)
