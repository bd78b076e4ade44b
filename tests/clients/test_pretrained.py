"""Models for text: the recurrent one, and a linear layer on a pretrained one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clients import pretrained
from clients.fetch import MINILM, fetch, is_whole
from clients.models import Gru, Linear, Mlp
from clients.places import DataError
from clients.pretrained import PretrainedClassifier
from clients.resident import ResidentModel, arrays_of
from clients.tasks.text import tokens
from tests.support.bert import WORDS, save_tiny_bert

TEXTS = ["the apples is red", "the leaf is green", "blue", "the unheard of sky is blue"]
VOCABULARY = 5 + len(WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def rows(folder) -> torch.Tensor:
    way = tokens([], vocab_size=3, max_length=10, tokenizer=str(folder))
    assert (way.vocab_size, way.padding_id) == (VOCABULARY, 0)
    return way.encode(TEXTS)


def classifier(folder, **settings) -> PretrainedClassifier:
    return PretrainedClassifier((10,), 3, VOCABULARY, 0, pretrained=str(folder), **settings).eval()


@pytest.fixture(autouse=True)
def nothing_known():
    """Each test begins without features from another."""
    pretrained._shared.cache_clear()


def longer(rows: torch.Tensor, by: int) -> torch.Tensor:
    return F.pad(rows, (0, by))


class TestGru:
    @pytest.mark.parametrize("padding_id", [0, 6])
    def test_padding_changes_nothing(self, padding_id):
        torch.manual_seed(0)
        model = Gru((12,), 3, 7, padding_id)
        rows = torch.full((4, 12), padding_id)
        for row, length in enumerate((1, 4, 9, 12)):
            rows[row, :length] = torch.randint(1, 6, (length,))
        together = model(rows)
        for row, length in enumerate((1, 4, 9, 12)):
            torch.testing.assert_close(model(rows[row : row + 1, :length]), together[row : row + 1])
        with torch.no_grad():
            model.embedding.weight[padding_id] = 1e3
        assert torch.equal(model(rows), together)

    def test_a_text_without_a_token_has_finite_logits(self):
        assert Gru((5,), 3, 7)(torch.zeros(2, 5, dtype=torch.long)).isfinite().all()

    def test_every_parameter_is_trained(self):
        model = Gru((6,), 4, 9)
        F.cross_entropy(model(torch.randint(1, 9, (8, 6))), torch.arange(8) % 4).backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        assert list(model.buffers()) == []

    def test_it_learns_which_word_is_there(self):
        torch.manual_seed(0)
        rows = torch.randint(4, 50, (200, 8))
        targets = torch.arange(200) % 2
        rows[torch.arange(200), torch.randint(8, (200,))] = 2 + targets
        model = Gru((8,), 2, 50)
        optimizer = torch.optim.SGD(model.parameters(), 2.0)
        for _ in range(60):
            optimizer.zero_grad()
            F.cross_entropy(model(rows), targets).backward()
            optimizer.step()
        assert (model(rows).argmax(1) == targets).float().mean() > 0.95

    @pytest.mark.parametrize(
        ("shape", "vocab_size"), [((1, 8, 8), None), ((8,), None), ((2, 8), 9)]
    )
    def test_inputs_that_are_no_tokens_are_refused(self, shape, vocab_size):
        with pytest.raises(ValueError, match="Gru takes rows of tokens"):
            Gru(shape, 3, vocab_size)


@pytest.mark.parametrize("model", [Mlp, Linear])
def test_models_for_numbers_refuse_tokens(model):
    with pytest.raises(ValueError, match=r"this task's inputs are tokens: use Gru \(model=gru\)"):
        model((8,), 3, 50)


class TestPretrained:
    def test_only_the_head_is_trained_sent_and_saved(self, folder):
        model = classifier(folder)
        assert sorted(model.state_dict()) == ["head.bias", "head.weight"]
        assert list(model.buffers()) == []
        assert ResidentModel(model, arrays_of(model)).flat.numel() == 3 * 16 + 3

    def test_features_are_the_mean_of_the_model_s_own_states(self, folder, rows):
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(folder).eval()
        model = classifier(folder)
        for row in rows:
            ids = row[row != 0].unsqueeze(0)
            with torch.no_grad():
                expected = model.head(encoder(input_ids=ids).last_hidden_state.mean(dim=1))
            torch.testing.assert_close(model(row.unsqueeze(0)), expected)

    def test_padding_the_batch_and_the_mode_change_nothing(self, folder, rows):
        model = classifier(folder)
        together = model._features(rows)
        pretrained._shared.cache_clear()
        fresh = classifier(folder).train()
        for row in range(len(rows)):
            alone = fresh._features(longer(rows[row : row + 1], 5))
            assert torch.equal(alone, together[row : row + 1])

    def test_the_encoder_runs_once_for_each_text_and_without_gradients(self, folder, rows):
        model = classifier(folder)
        calls = []
        hook = model._features.encoder.register_forward_hook(
            lambda module, *_: calls.append((module.training, torch.is_grad_enabled()))
        )
        for _ in range(3):
            F.cross_entropy(model.train()(rows), torch.zeros(4, dtype=torch.long)).backward()
        hook.remove()
        assert calls == [(False, False)] * 4
        assert model.head.weight.grad.abs().sum() > 0

    def test_models_of_one_process_share_what_is_known(self, folder, rows):
        first, second = classifier(folder), classifier(folder)
        first(rows)
        second.to("cpu")
        assert len(second._features._known) == len(rows)
        assert first._features is second._features
        assert not torch.equal(first(rows), second(rows))

    def test_memory_is_bounded(self, folder, rows, monkeypatch):
        monkeypatch.setattr("clients.pretrained._MOST_KEPT", 1)
        model = classifier(folder)
        assert torch.equal(model(rows), model(rows))
        assert len(model._features._known) == 1

    def test_an_encoder_that_is_not_frozen_is_trained_and_travels(self, folder, rows):
        model = classifier(folder, frozen=False)
        frozen = classifier(folder)
        model.head.load_state_dict(frozen.head.state_dict())
        torch.testing.assert_close(model(rows), frozen(rows))
        F.cross_entropy(model(rows), torch.zeros(4, dtype=torch.long)).backward()
        assert model.encoder.embeddings.word_embeddings.weight.grad.abs().sum() > 0
        assert any(name.startswith("encoder.") for name in model.state_dict())
        # The frozen one of the same folder is another object, and stays as it was.
        assert model.encoder is not frozen._features.encoder
        assert not any(p.requires_grad for p in frozen._features.encoder.parameters())

    def test_it_goes_where_the_model_goes(self, folder, rows):
        model = classifier(folder).to(torch.float64)
        assert next(model._features.encoder.parameters()).dtype == torch.float64
        assert model(rows).dtype == torch.float64
        assert len(model._features._known) == len(rows)
        model.to(torch.float32)

    @pytest.mark.parametrize(
        ("shape", "vocab_size", "message"),
        [
            ((1, 8, 8), None, "takes rows of tokens"),
            (
                (10,),
                VOCABULARY + 1,
                r"the task's tokens have 15 ids, those of .* have 14: set task.tok",
            ),
            ((17,), VOCABULARY, r"takes at most 16: set task.max_length=16"),
        ],
    )
    def test_a_task_that_does_not_fit_is_refused(self, folder, shape, vocab_size, message):
        with pytest.raises(ValueError, match=message):
            PretrainedClassifier(shape, 3, vocab_size, pretrained=str(folder))

    def test_a_folder_that_is_not_there_says_what_to_do(self, tmp_path):
        with pytest.raises(DataError, match=r"there is no folder .*: `make models`"):
            classifier(tmp_path / "none")

    def test_weights_that_would_be_unpickled_are_refused(self, tmp_path):
        save_tiny_bert(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save({}, tmp_path / "pytorch_model.bin")
        with pytest.raises(DataError, match="no model can be loaded"):
            classifier(tmp_path)


def test_tasks_and_models_are_imported_without_the_heavy_libraries():
    program = (
        "import sys, clients.tasks, clients.models, clients.pretrained, clients.fetch\n"
        "print([name for name in ('transformers', 'datasets', 'sklearn', 'PIL', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_minilm_is_fetched_and_knows_what_is_alike(tmp_path):
    folder = tmp_path / "minilm"
    assert fetch(MINILM, folder)
    assert is_whole(folder, MINILM)
    assert not fetch(MINILM, folder)
    way = tokens([], vocab_size=3, max_length=32, tokenizer=str(folder))
    model = PretrainedClassifier((32,), 2, way.vocab_size, way.padding_id, pretrained=str(folder))
    texts = [
        "A dog runs across the meadow.",
        "The puppy races over the grass.",
        "Interest rates rose.",
    ]
    features = F.normalize(model._features(way.encode(texts)))
    alike = features @ features.T
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
