"""The named strategies in a plain Flower app: no Hydra, no Trellis client, weights in and weights out."""

from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import strategies
from fl_app.engine import DeviceModel, EngineGrid, InProcessPool, one_by_one
from strategies.stages import Clip
from strategies.update import CONTROL

NODES = 4
ROUNDS = 8


read_digits = cache(load_digits)  # the file is parsed anew each time


def digits(part: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One of NODES parts, sorted by label so that clients differ; the last hundred images are nobody's."""
    images, labels = read_digits(return_X_y=True)
    order = np.argsort(labels[:-100], kind="stable").reshape(-1)
    mine = np.array_split(order, NODES)[part]
    return torch.tensor(images[mine] / 16, dtype=torch.float32), torch.tensor(labels[mine])


def make_model() -> torch.nn.Module:
    model = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


def fit(model: torch.nn.Module, part: int, epochs: int = 2) -> int:
    inputs, targets = digits(part)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(epochs):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return len(targets)


def vanilla_app(**options) -> ClientApp:
    """What Flower's own quickstart looks like."""
    app = ClientApp(**options)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = make_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        count = fit(model, int(context.node_config["partition-id"]))
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": count}),
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = make_model()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        inputs, targets = digits(int(context.node_config["partition-id"]))
        with torch.no_grad():
            right = (model(inputs).argmax(1) == targets).float().mean().item()
        return Message(
            RecordDict(
                {"metrics": MetricRecord({"accuracy": right, "num-examples": len(targets)})}
            ),
            reply_to=message,
        )

    return app


def on_engine(app: ClientApp) -> EngineGrid:
    def handle(message: Message) -> Message:
        part = message.metadata.dst_node_id
        context = Context(1, part, {"partition-id": nodes[part]}, RecordDict(), {})
        return app(message, context)

    pool = InProcessPool(lambda: one_by_one(handle))
    grid = EngineGrid(
        pool, num_clients=NODES, devices=DeviceModel(), seed=0, work=lambda client: 1.0
    )
    nodes = {node: client for client, node in grid.roster.items()}
    return grid


def accuracy(arrays: ArrayRecord) -> float:
    images, labels = read_digits(return_X_y=True)
    model = make_model()
    model.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        found = model(torch.tensor(images[-100:] / 16, dtype=torch.float32)).argmax(1)
    return float((found == torch.tensor(labels[-100:])).float().mean())


NAMED = {
    "fedavg": strategies.fedavg,
    "fedprox": lambda **kw: strategies.fedprox(mu=0.1, **kw),
    "fedavgm": lambda **kw: strategies.fedavgm(momentum=0.5, **kw),
    "fedadagrad": lambda **kw: strategies.fedadagrad(lr=0.1, **kw),
    "fedadam": lambda **kw: strategies.fedadam(lr=0.1, **kw),
    "fedyogi": lambda **kw: strategies.fedyogi(lr=0.1, **kw),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_vanilla_client_trains_under_every_named_strategy(name):
    strategy = NAMED[name]()
    result = strategy.start(
        on_engine(vanilla_app()), ArrayRecord(make_model().state_dict()), num_rounds=ROUNDS
    )
    assert accuracy(result.arrays) > 0.6
    assert sorted(result.evaluate_metrics_clientapp) == list(range(1, ROUNDS + 1))


def test_the_proximal_coefficient_is_in_every_training_request():
    seen = []

    def spy(message, context, call_next):
        seen.append(message.content["config"].get("proximal-mu"))
        return call_next(message, context)

    strategy = strategies.fedprox(mu=0.25, federated_every=0)
    strategy.start(
        on_engine(vanilla_app(mods=[spy])), ArrayRecord(make_model().state_dict()), num_rounds=1
    )
    assert seen == [0.25] * NODES


def test_the_mod_gives_the_model_that_the_servers_subtraction_gives():
    arrays = ArrayRecord(make_model().state_dict())
    plain = strategies.fedavg(federated_every=0).start(
        on_engine(vanilla_app()), arrays, num_rounds=3
    )
    app = vanilla_app(mods=[strategies.pipeline_mod()])
    encoded = strategies.fedavg(vanilla=False, federated_every=0).start(
        on_engine(app), arrays, num_rounds=3
    )
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(array.numpy(), encoded.arrays[name].numpy())


def test_a_stage_works_in_a_vanilla_app_that_carries_the_mod():
    clip = Clip(norm=0.01)
    pipeline = strategies.Pipeline(stages=[clip])
    lengths = []
    strategy = strategies.PipelineStrategy(
        pipeline,
        federated_every=0,
        hooks=[lambda view: lengths.append(np.linalg.norm(view.model.parameters))],
    )
    app = vanilla_app(mods=[strategies.pipeline_mod(stages=[clip])])
    strategy.start(on_engine(app), ArrayRecord(make_model().state_dict()), num_rounds=2)
    assert 0 < lengths[0] <= 0.01


def test_a_stage_without_its_client_half_is_refused():
    with pytest.raises(strategies.ContractError, match="pipeline_mod"):
        strategies.PipelineStrategy(
            strategies.Pipeline(
                collector=strategies.collectors.Plain(vanilla=True), stages=[Clip()]
            )
        )


def test_scaffold_runs_in_an_app_of_ones_own_that_returns_its_control():
    own: dict[int, np.ndarray] = {}
    app = ClientApp(mods=[strategies.pipeline_mod()])
    lr, epochs = 0.5, 3

    @app.train()
    def train(message: Message, context: Context) -> Message:
        part = int(context.node_config["partition-id"])
        sent = message.content["arrays"].to_torch_state_dict()
        model = make_model()
        model.load_state_dict(sent)
        control = message.content[CONTROL][CONTROL].numpy()
        mine = own.setdefault(part, np.zeros_like(control))
        inputs, targets = digits(part)
        order = list(sent)
        for _ in range(epochs):
            loss = cross_entropy(model(inputs), targets)
            gradients = torch.autograd.grad(
                loss, [dict(model.named_parameters())[name] for name in order]
            )
            offset = 0
            with torch.no_grad():
                for name, gradient in zip(order, gradients, strict=True):
                    parameter = dict(model.named_parameters())[name]
                    term = torch.from_numpy(
                        (control - mine)[offset : offset + gradient.numel()]
                    ).view_as(gradient)
                    parameter -= lr * (gradient + term)
                    offset += gradient.numel()
        moved = np.concatenate([(model.state_dict()[n] - sent[n]).numpy().ravel() for n in order])
        change = -control - moved / (epochs * lr)
        own[part] = mine + change
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                CONTROL: ArrayRecord([change.astype(np.float32)]),
                "metrics": MetricRecord({"num-examples": len(targets)}),
            }
        )
        return Message(content, reply_to=message)

    strategy = strategies.scaffold(population=NODES, federated_every=0)
    result = strategy.start(
        on_engine(app), ArrayRecord(make_model().state_dict()), num_rounds=ROUNDS
    )
    assert accuracy(result.arrays) > 0.6
    np.testing.assert_allclose(
        strategy.model.broadcast()[CONTROL],
        np.mean(list(own.values()), axis=0),
        rtol=1e-4,
        atol=1e-6,
    )
