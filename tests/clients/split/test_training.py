"""Split training is the training of the whole model: step by step, whatever the cut, the family and the shape."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients.split import SplitTrainer
from clients.tasks import Examples
from clients.trainers.sgd import seed_generators
from strategies.collectors import Split
from strategies.collectors.split_session import SPLIT
from strategies.seeds import integer
from strategies.update import Update
from tests.support.split import VOCABULARY, Sentences, SplitRun, save_tiny

TRAINER = SplitTrainer(batch_size=7, local_epochs=2, lr=0.01)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {kind: save_tiny(root / kind, kind) for kind in ("bert", "gpt2", "llama")}


def unsplit(run: SplitRun, client: int = 0) -> dict[str, np.ndarray]:
    """What torch's own optimiser makes of the whole model on the same batches: the change of each array."""
    model, task, examples = run.build(), run.task, run.data().train(client)
    before = {name: torch.from_numpy(array.copy()) for name, array in run.arrays.items()}
    model.load_state_dict(before)
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    settings = {"momentum": run.trainer.momentum} if run.trainer.optimizer == "sgd" else {}
    settings["weight_decay"] = run.trainer.weight_decay
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = kinds[run.trainer.optimizer](trained, lr=run.trainer.lr, **settings)
    with torch.random.fork_rng(devices=[]):
        seed_generators(torch.device("cpu"), integer(5, "train", 1, client))
        for batch in run.trainer.batches(len(examples)):
            optimizer.zero_grad()
            task.loss(model(examples.inputs[batch]), examples.targets[batch]).backward()
            optimizer.step()
    return {n: (p.detach() - before[n]).numpy() for n, p in model.named_parameters()}


def agrees(update: Update, expected: dict[str, np.ndarray], tolerance: float = 1e-6) -> None:
    found = update.delta.layout.views(update.delta.vector)
    assert set(found) == set(expected)
    for name, change in expected.items():
        assert np.abs(change).max() > 1e-5, name  # something was trained
        np.testing.assert_allclose(found[name], change, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("at", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_one_batch_an_exchange_is_unsplit_training(tmp_path, folders, kind, at, u_shaped):
    model = {"split_point": at, "u_shaped": u_shaped}
    run = SplitRun(tmp_path, folders[kind], Sentences(), TRAINER, model=model)
    agrees(run.run()[0], unsplit(run))
    exchanges = 2 * -(-len(run.data().train(0)) // 7)
    assert run.sent == exchanges * (1 + u_shaped) + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "lr": 0.5},
        {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9},
        {"weight_decay": 0.1},
    ],
    ids=str,
)
def test_so_it_is_with_every_optimiser(tmp_path, folders, settings):
    run = SplitRun(tmp_path, folders["bert"], Sentences(), replace(TRAINER, **settings))
    agrees(run.run()[0], unsplit(run))


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_clients_of_v1_share_nothing_and_those_of_v2_one_upper_part(tmp_path, folders, variant):
    run = SplitRun(
        tmp_path, folders["bert"], Sentences(), TRAINER, Split(variant=variant), num_clients=3
    )
    came = run.run()
    names = run.whole.clients_names()
    changes = {
        c: u.delta.layout.views(u.delta.vector) for c, u in came.items() if isinstance(u, Update)
    }
    assert sorted(changes) == [0, 1, 2]
    for client in range(3):
        if variant == "v1":
            agrees(came[client], unsplit(run, client))
        for name, change in changes[client].items():
            same = np.array_equal(change, changes[0][name])
            assert same == (client == 0 or (variant == "v2" and name not in names)), name


def test_the_auxiliary_head_learns_the_servers_gradients_and_saves_trips(tmp_path, folders):
    def run(name: str, **settings) -> SplitRun:
        trainer = replace(TRAINER, local_epochs=8, **settings)
        model = {"auxiliary": bool(settings)}
        return SplitRun(tmp_path / name, folders["bert"], Sentences(), trainer, model=model)

    waiting, alone = run("waiting"), run("alone", auxiliary_steps=3, alignments=20)
    figures = alone.run()[0].metrics
    waiting.run()
    batches = 8 * -(-len(waiting.data().train(0)) // 7)
    assert (waiting.sent, alone.sent) == (batches + 1, batches // 4 + 1)
    never = run("never", auxiliary_steps=3, alignments=1, auxiliary_lr=1e-9).run()[0].metrics
    assert figures["auxiliary_error"] < 0.6 * never["auxiliary_error"]
    assert figures["auxiliary_loss"] < 1.2


def test_a_turn_that_is_asked_for_twice_has_the_same_noise_twice(tmp_path, folders):
    def turn(session) -> bytes:
        (request,) = session.start()
        (reply,) = run.client().answer([Message(request.content, 1, "train")])
        return reply.content[SPLIT]["0.activation.values"].data

    run = SplitRun(tmp_path, folders["bert"], Sentences(), replace(TRAINER, noise=0.5))
    first, second = run.session([0]), run.session([0])
    once = turn(first)
    assert turn(first) == once
    assert turn(second) != once


class Prose(Sentences):
    """The next token of each, and nothing to say behind a text's end."""

    def __init__(self) -> None:
        super().__init__()
        self.num_classes = VOCABULARY
        inputs = self._examples.inputs
        targets = torch.nn.functional.pad(inputs[:, 1:], (0, 1))
        self._examples = Examples(inputs, targets.masked_fill(targets == 0, -100))

    def losses(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.cross_entropy(
            output.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return each.sum(dim=1) / (targets != -100).sum(dim=1)


@pytest.mark.parametrize("u_shaped", [False, True], ids=["", "u_shaped"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_learns_its_next_token_in_two_halves(tmp_path, folders, kind, u_shaped):
    model = {"split_point": 2, "u_shaped": u_shaped, "head": "tokens"}
    trainer = replace(TRAINER, batch_size=2, local_epochs=1)
    run = SplitRun(tmp_path, folders[kind], Prose(), trainer, model=model)
    agrees(run.run()[0], unsplit(run))


def test_a_frozen_residual_takes_part_and_stays(tmp_path, folders):
    run = SplitRun(tmp_path, folders["bert"], Sentences(), TRAINER, model={"residual_rank": 2})
    for name, array in run.arrays.items():
        if name.startswith("residual"):
            array[...] = 0.1
    change = run.run()[0].delta
    found, expected = change.layout.views(change.vector), unsplit(run)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)
        assert wanted.any() != name.startswith("residual"), name
