"""The next token of prose as a task."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clients.places import DataError
from clients.tasks import FederatedData, Prose, evaluate
from clients.tasks.passages import read_packages
from clients.tasks.prose import IGNORED, perplexity
from clients.tasks.task import check_task, fingerprint
from clients.tasks.text import load_tokenizer
from tests.support.bert import save_tiny_bert
from tests.support.notes import save_tiny_language_model, write_notes

FEW = {"packages": ("rich", "click"), "max_per_package": 60, "max_length": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_language_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def task(folder):
    return Prose(**FEW, tokenizer=folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


class Fixed(torch.nn.Module):
    """Logits of a table, by the token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.table = torch.nn.Parameter(3 * torch.randn(size, size, generator=generator))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.table[inputs]


def texts_of(task, tokenizer, examples, ids):
    """Each module's text, put together again from its rows."""
    streams: dict[str, list[int]] = {}
    for row, target, module in zip(examples.inputs, examples.targets, ids, strict=True):
        kept = target != IGNORED
        streams.setdefault(module, [int(row[0])]).extend(target[kept].tolist())
    return {module: tokenizer.decode(stream[1:-1]) for module, stream in streams.items()}


def test_it_is_a_task_of_tokens_with_the_next_one_as_the_target(task, tokenizer):
    check_task(task)
    assert task.input_shape == (24,)
    assert task.num_classes == task.vocab_size == len(tokenizer)
    assert task.padding_id == tokenizer.pad_token_id
    for examples in (task.train(), task.test()):
        assert examples.inputs.dtype == examples.targets.dtype == torch.long
        assert examples.targets.shape == examples.inputs.shape
        known = examples.targets != IGNORED
        assert known[:, 0].all()  # no row without a token to learn
        following = known[:, 1:]
        assert torch.equal(examples.inputs[:, 1:][following], examples.targets[:, :-1][following])
        # Padding stands at the end, and only where there is no target.
        assert (known[:, :-1] >= known[:, 1:]).all()
        assert (examples.inputs[~known] == task.padding_id).all()
        assert (examples.inputs[known] != task.padding_id).all()


def test_rows_hold_every_text_whole_and_hardly_any_padding(task, tokenizer):
    passages = read_packages(("click", "rich"), 60, 8)
    train = texts_of(task, tokenizer, task.train(), task.natural_ids())
    for module, text in train.items():
        own = [item.text for item in passages if item.module == module]
        assert text == "<|endoftext|>".join(own)
    modules = {item.module for item in passages}
    padded = (task.train().targets == IGNORED).float().mean()
    assert set(train) < modules
    assert padded < 0.5 * 24 * len(modules) / task.train().targets.numel() + 0.05


def test_no_module_is_in_two_folds_and_each_is_tested_once(folder):
    modules = {item.module for item in read_packages(("click", "rich"), 60, 8)}
    held_out = []
    for fold in range(3):
        made = Prose(**FEW, tokenizer=folder, fold=fold, folds=3)
        held_out.append(modules - set(made.natural_ids()))
        assert len(made.test())
    assert set().union(*held_out) == modules
    assert sum(map(len, held_out)) == len(modules)


def test_loss_is_the_mean_over_a_rows_own_tokens():
    output = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, IGNORED, IGNORED]])
    found = Prose.losses(None, output, targets)
    expected = [
        F.cross_entropy(output[0], targets[0]),
        F.cross_entropy(output[1, :2], targets[1, :2]),
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(Prose.losses(None, output, torch.full((2, 4), IGNORED)), torch.zeros(2))


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_perplexity_is_that_of_all_tokens_whatever_the_batches(task, batch_size):
    model = Fixed(task.vocab_size)
    found = evaluate(model, task, task.test(), batch_size=batch_size)
    with torch.no_grad():
        logits = model(task.test().inputs)
    known = task.test().targets != IGNORED
    loss = F.cross_entropy(logits[known], task.test().targets[known])
    assert perplexity(found) == pytest.approx(math.exp(loss), rel=1e-5)
    right = (logits.argmax(-1) == task.test().targets).sum(1) / known.sum(1)
    assert found["accuracy"] == pytest.approx(right.mean().item(), rel=1e-5)
    assert found["tokens"] == pytest.approx(known.sum(1).float().mean().item(), rel=1e-6)


def test_perplexity_of_all_clients_follows_from_their_means(task):
    data = FederatedData(task, 4, test_fraction=0.3)
    model = Fixed(task.vocab_size)
    each = [evaluate(model, task, data.test(client)) for client in range(4)]
    total = sum(one["num_examples"] for one in each)
    pooled = {
        name: sum(one[name] * one["num_examples"] for one in each) / total
        for name in ("nll", "tokens")
    }
    rows = np.concatenate([data.rows(client)[1] for client in range(4)])
    whole = evaluate(model, task, task.train().take(rows))
    assert perplexity(pooled) == pytest.approx(perplexity(whole), rel=1e-5)


def test_modules_are_natural_clients_and_neighbours_share_one(task):
    data = FederatedData(task, 4, partition="natural")
    owners = np.array(task.natural_ids())
    of_client = [set(owners[np.concatenate(data.rows(client))]) for client in range(4)]
    assert not of_client[0] & of_client[1]
    assert max(of_client[0]) < min(of_client[1])
    assert data.label_counts().shape == (4, 1)


def test_every_row_has_its_package(task):
    assert task.sources[0] == [module.partition("/")[0] for module in task.natural_ids()]
    assert len(task.sources[1]) == len(task.test())
    assert set(task.sources[1]) == {"rich", "click"}


def test_a_folder_of_ones_own_text(folder, tmp_path):
    notes = write_notes(tmp_path / "notes", seed=7)
    made = Prose(folder=notes, tokenizer=folder, max_length=32, fold=1)
    check_task(made)
    names = {f"note-{number}.md" for number in range(6)}
    assert set(made.natural_ids()) < names
    text = " ".join((notes / name).read_text() for name in sorted(names))
    train = texts_of(made, load_tokenizer(folder), made.train(), made.natural_ids())
    assert all(piece in text for one in train.values() for piece in one.split("<|endoftext|>"))


def test_the_same_arguments_give_the_same_data(folder, task):
    read_packages.cache_clear()
    assert fingerprint(Prose(**FEW, tokenizer=folder)) == fingerprint(task)
    assert fingerprint(Prose(**{**FEW, "max_length": 25}, tokenizer=folder)) != fingerprint(task)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "takes the tokens of a language model: use model=lora_lm"),
        ({"tokenizer": "./no/such"}, r"there is no folder .*: `trellis make-base-model` makes"),
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"fold": 5}, "there are 5 folds"),
        ({"packages": ("no_such_package",)}, "no installed package"),
    ],
)
def test_what_cannot_be_is_refused_in_words(folder, change, message):
    with pytest.raises(ValueError, match=message):
        Prose(**{**FEW, "tokenizer": folder, **change})


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="no token for the end of a text"):
        Prose(**FEW, tokenizer=str(save_tiny_bert(tmp_path)))
