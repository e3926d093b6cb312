"""FedJAX, its jit backend; it shuffles within clients."""

import jax
import jax.numpy as jnp
import numpy as np
from common import WORK, Rounds, client, setting, start_model

jax.tree_map = getattr(jax, "tree_map", jax.tree_util.tree_map)  # fedjax 0.0.17 still asks for it
import fedjax  # noqa: E402

KIND = setting("model")
rounds = Rounds()


def apply(p, x):
    if KIND == "cnn":
        for i in (0, 2):
            x = jax.lax.conv_general_dilated(x, p[i], (1, 1), "SAME") + p[i + 1][:, None, None]
            x = jax.lax.reduce_window(jax.nn.relu(x), -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x, p = x.reshape(len(x), -1), p[4:]
    for i in range(0, len(p), 2):
        x = x @ p[i].T + p[i + 1]
        if i + 2 < len(p):
            x = jax.nn.relu(x)
    return x


def loss(p, batch, rng):
    log_p = jax.nn.log_softmax(apply(p, batch["x"]))
    return -jnp.mean(jnp.take_along_axis(log_p, batch["y"][:, None], 1))


def samples(c):
    x, y = client(c)
    return {"x": x, "y": y.astype(np.int32)}


data = fedjax.InMemoryFederatedData({c: samples(c) for c in range(setting("clients"))})
algorithm = fedjax.algorithms.fed_avg.federated_averaging(
    jax.grad(loss),
    fedjax.optimizers.sgd(setting("lr")),
    fedjax.optimizers.sgd(1.0),
    fedjax.ShuffleRepeatBatchHParams(batch_size=setting("batch"), num_epochs=setting("epochs"), drop_remainder=False),
)
state = algorithm.init([jnp.asarray(p.detach().numpy()) for p in start_model().parameters()])
rounds.mark()
for t, cohort in enumerate(WORK["cohorts"]):
    keys = jax.random.split(jax.random.PRNGKey(t), len(cohort))
    state, _ = algorithm.apply(state, [(int(c), data.get_client(int(c)), k) for c, k in zip(cohort, keys, strict=True)])
    jax.block_until_ready(state.params)
    rounds.mark()
rounds.done([np.asarray(p) for p in state.params])
