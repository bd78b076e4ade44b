"""The client answers whatever it is asked, each request on its own, and trains as a plain torch loop would."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from clients.client import CODE_HASH, CONFIG_HASH, NUM_CLIENTS, Client
from clients.models import Linear, Mlp
from clients.resident import ResidentModel, arrays_of
from clients.store import ClientStore
from clients.tasks import Digits, FederatedData, evaluate
from clients.trainers import SGD, FitJob, Scaffold
from fl_app.engine.flwr_internals import claim_identity
from strategies.replies import Expected, read_update
from strategies.seeds import integer
from strategies.stages import Clip
from strategies.update import CONTROL, DELTA
from strategies.wire import ARRAYS, CONFIG, METRICS, NUM_EXAMPLES, pack, pack_model

TASK = Digits()
CLIENTS = 4


@pytest.fixture(autouse=True)
def _identity():
    claim_identity(1)


def data(count: int = CLIENTS) -> FederatedData:
    return FederatedData(TASK, count, partition="iid", seed=3)


def module() -> torch.nn.Module:
    torch.manual_seed(5)
    return Mlp(TASK.input_shape, TASK.num_classes, hidden=(8,))


def client(tmp_path: Path, trainer: SGD | None = None, **options) -> Client:
    trainer = trainer or SGD(lr=0.1, batch_size=16, local_epochs=2)
    return Client(TASK, module(), data, trainer, store=ClientStore(tmp_path), seed=11, **options)


def request(kind: str = "train", who: int = 1, arrays=None, records=None, **config) -> Message:
    settings = {
        "client": who, "server-round": 3, "version": 2, "included": 0, NUM_CLIENTS: CLIENTS, **config
    }  # fmt: skip
    settings = {key: value for key, value in settings.items() if value is not None}
    content = {
        ARRAYS: pack_model(arrays_of(module()) if arrays is None else arrays),
        **(records or {}),
    }
    return Message(RecordDict({**content, CONFIG: ConfigRecord(settings)}), 1, kind)


def update_in(reply: Message, who: int = 1, extra=()):
    layout = ResidentModel(module(), arrays_of(module())).layout
    return read_update(reply.content, Expected(dict.fromkeys([DELTA, *extra], layout), who, 3, 2))


@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"momentum": 0.5, "weight_decay": 0.01}],
    ids=str,
)
def test_training_is_what_a_plain_torch_loop_gives_bit_for_bit(tmp_path, settings):
    trainer = SGD(lr=0.1, batch_size=16, local_epochs=2, **settings)
    (reply,) = client(tmp_path, trainer).answer([request()])
    update = update_in(reply)
    plain, examples = module(), data().train(1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, foreach=False, **settings)
    torch.manual_seed(integer(11, "train", 3, 1))
    losses = []
    for _ in range(2):
        for batch in torch.randperm(len(examples)).split(16):
            optimizer.zero_grad()
            loss = TASK.loss(plain(examples.inputs[batch]), examples.targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    for name, view in update.delta.layout.views(update.delta.vector).items():
        expected = plain.state_dict()[name].numpy() - arrays_of(module())[name]
        np.testing.assert_array_equal(view, expected)
    assert update.weight == len(examples)
    assert update.metrics["train_loss"] == pytest.approx(np.mean(losses))


def test_clients_do_not_disturb_one_another(tmp_path):
    ours = client(tmp_path)
    together = ours.answer([request(who=who) for who in (0, 1, 2)])
    alone = [client(tmp_path).answer([request(who=who)])[0] for who in (0, 1, 2)]
    for who, (one, other) in enumerate(zip(together, alone, strict=True)):
        np.testing.assert_array_equal(
            update_in(one, who).delta.vector, update_in(other, who).delta.vector
        )


def test_a_bad_request_fails_alone(tmp_path):
    bad = [
        request(who=99),
        request(**{"server-round": None}),
        request(**{NUM_CLIENTS: "many"}),
        Message(RecordDict({CONFIG: ConfigRecord({"client": 1})}), 1, "train"),
        request(kind="evaluate", who=-1),
    ]
    replies = client(tmp_path).answer([bad[0], request(), *bad[1:]])
    assert [reply.has_error() for reply in replies] == [True, False, True, True, True, True]
    assert all(reply.error.reason for reply in replies if reply.has_error())


def test_a_model_of_another_architecture_is_an_error_that_says_so(tmp_path):
    other = arrays_of(Linear(TASK.input_shape, TASK.num_classes))
    (reply,) = client(tmp_path).answer([request(arrays=other)])
    assert "configured with the same model" in reply.error.reason


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_mend(tmp_path):
    (reply,) = client(tmp_path, SGD(lr=1e30)).answer([request()])
    assert "lower client.lr" in reply.error.reason


def test_evaluation_is_on_the_clients_own_test_part(tmp_path):
    (reply,) = client(tmp_path).answer([request("evaluate")])
    found = evaluate(module(), TASK, data().test(1))
    metrics = reply.content[METRICS]
    assert metrics[NUM_EXAMPLES] == len(data().test(1)) > 0
    assert metrics["accuracy"] == pytest.approx(found["accuracy"])
    assert metrics["loss"] == pytest.approx(found["loss"])


def test_the_stages_client_half_uses_what_the_server_sent(tmp_path):
    ours = client(tmp_path, stages=[Clip(norm=5.0)])
    (reply,) = ours.answer([request(**{"clip.norm": 0.01})])
    assert np.linalg.norm(update_in(reply).delta.vector) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(("key", "word"), [(CODE_HASH, "code"), (CONFIG_HASH, "configuration")])
def test_ends_that_differ_notice(tmp_path, kind, key, word):
    ours = client(tmp_path, hashes={CODE_HASH: "a" * 64, CONFIG_HASH: "b" * 64})
    (reply,) = ours.answer([request(kind, **{key: "c" * 64})])
    assert f"the server's {word} (cccccccccccc) differs" in reply.error.reason
    hello = ours.hello(request("query.hello", **{key: "c" * 64}), 2)
    assert "differs" in hello.error.reason
    (good,) = ours.answer([request(kind, **{CODE_HASH: "a" * 64, CONFIG_HASH: "b" * 64})])
    assert not good.has_error()


def test_hello_gives_the_logical_client(tmp_path):
    assert client(tmp_path).hello(request("query.hello"), 2).content[CONFIG]["client"] == 2


def test_plain_training_writes_nothing_to_disk(tmp_path):
    client(tmp_path).answer([request()])
    assert list(tmp_path.iterdir()) == []


def test_scaffold_remembers_its_control_only_once_the_server_has_the_update(tmp_path):
    trainer = Scaffold(lr=0.1, batch_size=16)
    size = ResidentModel(module(), arrays_of(module())).layout.size
    server = {CONTROL: ArrayRecord({CONTROL: pack(np.full(size, 0.01, np.float32))})}

    def changed(included: int) -> np.ndarray:
        (reply,) = client(tmp_path, trainer).answer([request(records=server, included=included)])
        return update_in(reply, extra=[CONTROL]).sections[CONTROL].vector

    first = changed(included=0)
    np.testing.assert_array_equal(changed(included=0), first)
    assert not np.array_equal(changed(included=3), first)


@pytest.mark.parametrize("setting", [{"momentum": 0.9}, {"max_grad_norm": 1.0}])
def test_scaffold_refuses_what_breaks_its_control_variate(setting):
    with pytest.raises(ValueError, match="mean gradient"):
        Scaffold(**setting)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    (reply,) = client(tmp_path, SGD(lr=1.0, batch_size=10_000, max_grad_norm=1e-3)).answer(
        [request()]
    )
    assert np.linalg.norm(update_in(reply).delta.vector) == pytest.approx(1e-3, rel=1e-3)


def test_mixed_precision_is_left_alone_where_there_is_no_gpu(tmp_path):
    trainer = {"lr": 0.1, "batch_size": 16}
    plain, mixed = (
        client(tmp_path, SGD(**trainer, amp=amp)).answer([request()])[0] for amp in (False, True)
    )
    np.testing.assert_array_equal(update_in(plain).delta.vector, update_in(mixed).delta.vector)
    assert SGD(device="auto").torch_device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert SGD(device="meta").torch_device == "meta"


def test_the_callers_random_state_is_left_alone(tmp_path):
    ours, asked = client(tmp_path), [request()]
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ours.answer(asked)
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_trainer_reports_each_failed_job_and_trains_the_others():
    model = ResidentModel(module(), arrays_of(module()))
    examples = data().train(0)
    good = FitJob(0, arrays_of(module()), {}, examples, 1, {}, {})
    bad = FitJob(1, {}, {}, examples, 1, {}, {})
    fits = SGD().fit([bad, good], model, TASK)
    assert isinstance(fits[0], ValueError)
    assert fits[1].num_examples == len(examples)


class Broken(SGD):
    """Fails, and says something of an example."""

    def fit_one(self, job: FitJob, model: ResidentModel, task) -> object:
        raise IndexError("Target 7 is out of bounds.")


def test_a_client_that_trusts_no_server_sends_zeros_where_its_training_fails(tmp_path):
    silent = client(tmp_path, Broken(), stages=[Clip(norm=1.0)], secretive=True, silent=True)
    (reply,) = silent.answer([request(**{"clip.norm": 1.0})])
    assert not reply.has_error()
    assert not update_in(reply).delta.vector.any()


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_secretive_client_says_neither_why_it_failed_nor_how_a_model_does(tmp_path, kind):
    (reply,) = client(tmp_path, Broken(), secretive=True).answer([request(kind)])
    assert reply.has_error()
    assert "Target" not in reply.error.reason
    (told,) = client(tmp_path, Broken()).answer([request("train")])
    assert "Target 7" in told.error.reason
