"""Rules over products in real models: the combined model says what the mean of the clients' models would say.

The mean of models W + s·Bᵢ·Aᵢ is one model of rank Σ rᵢ with the clients' factors side by side: that is the reference.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from clients.fetch import MINILM, is_whole
from clients.lora import LoraClassifier
from clients.resident import arrays_of
from strategies.combiners import LoraFedEx, LoraMean, LoraStack, LoraSvd
from strategies.parts import narrowed, widened
from strategies.protocols import Plan
from strategies.update import DELTA, Layout, Update
from tests.support.bert import WORDS, save_tiny_bert

RANK, ALPHA, CLASSES, LENGTH = 4, 12.0, 3, 10
RANKS = (1, 2, 4)
WEIGHTS = (1.0, 5.0, 2.0)


@pytest.fixture(scope="module", params=["tiny", "minilm"])
def place(request, tmp_path_factory) -> tuple[str, int]:
    """A folder and the size of its vocabulary."""
    if request.param == "tiny":
        return str(save_tiny_bert(tmp_path_factory.mktemp("bert"))), 5 + len(WORDS)
    folder = Path(__file__).parents[3] / "models" / "minilm"
    if not is_whole(folder, MINILM):
        pytest.skip("models/minilm is not there: make models")
    return str(folder), 30_522


def model(place, **settings) -> LoraClassifier:
    torch.manual_seed(1)
    folder, vocabulary = place
    keywords = {"rank": RANK, "alpha": ALPHA} | settings
    return LoraClassifier((LENGTH,), CLASSES, vocabulary, 0, pretrained=folder, **keywords).eval()


def logits(one: LoraClassifier, arrays) -> np.ndarray:
    rows = torch.randint(5, 14, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    one.load_state_dict({name: torch.as_tensor(array) for name, array in arrays.items()})
    with torch.no_grad():
        return one(rows).numpy()


def part(layout: Layout, rank: int) -> Layout:
    shapes = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name.endswith("A.weight"):
            shapes[name] = (rank, shape[1])
        elif name.endswith("B.weight"):
            shapes[name] = (shape[0], rank)
        elif not name.startswith("residual."):
            shapes[name] = shape
    return Layout(tuple(shapes), tuple(shapes.values()))


def round_of(rule, place, *, residual: int = 0):
    """One round from a model whose B is not zero: the arrays after it, and each client's own after training."""
    one = model(place, residual_rank=residual)
    rng = np.random.default_rng(3)
    sent = {
        name: array
        if name.startswith("residual.")
        else array + 0.1 * rng.standard_normal(array.shape, np.float32)
        for name, array in arrays_of(one).items()
    }
    layout = Layout.of(sent)
    whole = layout.flatten(sent)
    held, own = rule.begin(Plan({DELTA: layout}, 3, 3, sent=whole)), []
    for client, (rank, weight) in enumerate(zip(RANKS, WEIGHTS, strict=True)):
        mine = part(layout, rank)
        change = 0.1 * rng.standard_normal(mine.size).astype(np.float32)
        held.add(
            Update({DELTA: widened(change.astype(np.float32), mine, layout)}, weight, (client,), 0)
        )
        blocks = narrowed(sent, mine)
        own.append({n: blocks[n] + view for n, view in mine.views(change).items()})
    result = held.result()
    after = layout.views(whole + result.delta.vector)
    return one, after, own, held.figures()


def reference(place, own, *, by_rank: bool = False) -> np.ndarray:
    """The mean of the clients' models, as one of rank Σ rᵢ and the same scale; or each rank's over its owners."""
    total, shares = sum(RANKS), [weight / sum(WEIGHTS) for weight in WEIGHTS]
    arrays = {}
    for name in own[0]:
        mine = [client[name] for client in own]
        if name.endswith("A.weight"):
            arrays[name] = np.concatenate(mine)
            continue
        scaled = [share * array for share, array in zip(shares, mine, strict=True)]
        if by_rank and name.endswith("B.weight"):
            having = [
                sum(s for s, r in zip(shares, RANKS, strict=True) if r > k)
                for k in range(max(RANKS))
            ]
            scaled = [array / having[: array.shape[1]] for array in scaled]
        arrays[name] = np.concatenate(scaled, axis=1) if name.endswith("B.weight") else sum(scaled)
    return logits(model(place, rank=total, alpha=ALPHA / RANK * total), arrays)


@pytest.mark.parametrize("rule", [LoraStack, LoraFedEx])
def test_with_room_in_the_residual_the_model_is_the_mean_of_the_clients_models(rule, place):
    """Stacking needs the clients' 7 ranks, FedEx-LoRA those of the mean factors, too: 11 of 16."""
    one, after, own, figures = round_of(rule(alpha=ALPHA, rank=RANK), place, residual=16)
    wanted = reference(place, own, by_rank=rule is LoraFedEx)
    start = logits(one, arrays_of(model(place, residual_rank=16)))
    np.testing.assert_allclose(logits(one, after), wanted, atol=2e-4)
    assert np.abs(wanted - start).max() > 0.05
    assert figures["lora_error"] < 1e-6


def test_what_the_model_lacks_is_what_the_rule_says(place):
    """The best factors of the model's rank come nearer to the mean of the models than the mean of factors."""
    found = {}
    for rule in (LoraSvd(), LoraMean()):
        one, after, own, figures = round_of(rule, place)
        wanted = reference(place, own)
        found[type(rule)] = float(np.linalg.norm(logits(one, after) - wanted)), figures
    (svd, of_svd), (mean, of_mean) = found[LoraSvd], found[LoraMean]
    assert of_svd["lora_error"] > 0
    assert of_mean["lora_cross_term"] > 0
    assert svd < mean
