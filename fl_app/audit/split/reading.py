"""Tokens of clients' texts, read from what a run exposes: from activations at the cut, and from an adapter's gradient.

The attacks' arithmetic is in `inverter`, `matching` and `span`, which know no run; here it meets the run's texts and
wire, and each attack comes to figures with what a guess would get.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from clients.tasks import Examples
from fl_app.audit.split.exposure import Exposure, NotApplicableError, Texts, Wire, texts_of
from fl_app.audit.split.first import first_layers, inputs_of
from fl_app.audit.split.inverter import fit_inverter
from fl_app.audit.split.matching import dictionary, nearest
from fl_app.audit.split.score import Score, most_frequent, share
from fl_app.audit.split.span import closest, distances, in_span, row_space
from fl_app.audit.training import Progress
from strategies.seeds import generator

_INVERTED = (
    "whoever holds the clients' half (server, any client) and sees activations: of the tokens of texts it has never "
    "seen, the share that it names right, having learnt on public text"
)
_LOOKED_UP = (
    "whoever holds the clients' half and sees activations: of the tokens, the share that it names right by running "
    "each word through the half alone; needs no text"
)
_SPANNED = (
    "whoever sees one client's update of one batch: of the tokens in the batch that are found (recall), of those named "
    "that are in it (precision); places and order are not told"
)
_RANKED = (
    "as the span check, where the batch has more tokens than the gradient has rows: the nearest tokens are named, as "
    "many as the batch has"
)


def inverted(
    exposure: Exposure, at: int, wires: Sequence[Wire], confidence: float, progress: Progress
) -> list[Score]:
    """The learned inverter at a cut, for each wire; the attacker learns on what the same wire makes of public text."""
    texts = exposure.private
    embeddings = exposure.module(at).lower.bottom.get_input_embeddings().weight.detach().float()
    public = exposure.activations(at, exposure.public, wires)
    private = exposure.activations(at, texts, wires)
    found = []
    for number, (wire, learnt_on, seen) in enumerate(zip(wires, public, private, strict=True), 1):
        attack = fit_inverter(learnt_on, exposure.public.truth, embeddings, seed=exposure.seed)
        score = _tokens(
            texts, attack.guess(seen), ("learned inverter", at, wire.name, _INVERTED), confidence
        )
        found.append(score)
        progress(number, len(wires))
    return found


def looked_up(
    exposure: Exposure, at: int, wires: Sequence[Wire], confidence: float, progress: Progress
) -> list[Score]:
    """The dictionary of all words at a cut, for each wire."""
    texts, module = exposure.private, exposure.module(at)
    vocabulary = torch.arange(exposure.task.vocab_size or 0)
    vocabulary = vocabulary[vocabulary != exposure.task.padding_id]
    before, after = exposure.frame
    entries = dictionary(
        lambda ids: module.lower(ids)[0], vocabulary, before=before, after=after, progress=progress
    )
    private = exposure.activations(at, texts, wires)
    return [
        _tokens(
            texts,
            nearest(seen, entries, vocabulary),
            ("dictionary", at, wire.name, _LOOKED_UP),
            confidence,
        )
        for wire, seen in zip(wires, private, strict=True)
    ]


def _tokens(
    texts: Texts, guessed: Tensor, told: tuple[str, int, str, str], confidence: float
) -> Score:
    attack, at, setting, meaning = told
    truth, count = texts.truth, len(texts.lengths)
    hits = np.bincount(texts.owner, (guessed == truth).numpy(), count)
    trials = np.bincount(texts.owner, minlength=count)
    value, interval = share(hits, trials, confidence)
    return Score(
        attack=attack,
        measure="accuracy",
        cut=at,
        setting=setting,
        value=value,
        interval=interval,
        baseline=most_frequent(truth.numpy())[1],
        n=len(truth),
        units=int((trials > 0).sum()),
        meaning=meaning,
    )


def spanned(exposure: Exposure, confidence: float, progress: Progress) -> list[Score]:
    """The span check on gradients of the first adapters, by how many tokens a batch has.

    Raises:
        NotApplicableError: these adapters tell nothing in this way; the message says why.
    """
    module, length = exposure.module(), exposure.task.input_shape[0]
    layers = first_layers(module, exposure.labelled.examples.inputs)
    names = [f"{name}.A.weight" for name in layers]
    rows = sum(len(dict(module.lower.adapters.named_parameters())[name]) for name in names)
    cases = _cases(exposure, rows)
    bases = [row_space(_told(exposure, names, batch, how)) for _, batch, how in cases]
    if not any(len(basis) for basis in bases):
        raise NotApplicableError("B is zero, so that A has no gradient yet")
    vocabulary = torch.arange(exposure.task.vocab_size or 0)
    apart = distances(bases, inputs_of(module, layers, length), vocabulary, progress=progress)
    found = []
    for setting in dict.fromkeys(name for name, _, _ in cases):
        mine = [place for place, case in enumerate(cases) if case[0] == setting]
        batches = [texts_of(cases[place][1], exposure.task.padding_id) for place in mine]
        found += _span_scores(
            exposure, f"{setting}, {rows} rows", batches, apart[mine], vocabulary, confidence
        )
    return found


def _told(exposure: Exposure, names: Sequence[str], batch: Examples, how: str) -> list[Tensor]:
    """The gradients of some adapters, or the changes that the run's optimiser makes of them in its first step."""
    parameters = dict(exposure.module().lower.adapters.named_parameters())
    gradient = exposure.gradients(batch, exposure.wire, mean=True)["adapters"]
    if how == _OWN:
        trained = [one.detach().flatten() for one in parameters.values() if one.requires_grad]
        start = torch.cat(trained)
        after, trainer = start.clone(), exposure.trainer
        trainer.step(after, gradient.clone(), start, None, trainer.moments(start))
        gradient = after - start
    sizes = [one.numel() for one in parameters.values() if one.requires_grad]
    owners = [name for name, one in parameters.items() if one.requires_grad]
    parts = dict(zip(owners, torch.split(gradient, sizes), strict=True))
    return [parts[name].view_as(parameters[name]) for name in names]


_PLAIN, _OWN = "one gradient", "one step of the run's optimiser"


def _cases(exposure: Exposure, rows: int) -> list[tuple[str, Examples, str]]:
    """What is tried: its name, the batch, and whether the gradient is seen or the step that is made of it."""
    texts, length = exposure.labelled, exposure.task.input_shape[0]
    count = min(exposure.sizes.spans, len(texts.lengths))
    padding = exposure.task.padding_id
    long = texts.lengths.argsort(descending=True, stable=True)[
        : max(count, len(texts.lengths) // 2)
    ]
    chosen = torch.from_numpy(generator(exposure.seed, "spans").permutation(long.numpy())[:count])
    found: list[tuple[str, Examples, str]] = []
    for row in chosen:
        whole = texts.examples.take(row[None])
        short = whole.inputs.clone()
        short[:, min(rows, length) :] = padding
        beginning = Examples(short, whole.targets)
        found += [
            (f"a text's first {min(rows, length)} tokens, {_PLAIN}", beginning, _PLAIN),
            (f"the same, {_OWN}", beginning, _OWN),
            (f"a text, {_PLAIN}", whole, _PLAIN),
        ]
    size = exposure.trainer.batch_size
    batches = exposure.batches(texts)[: exposure.sizes.spans]
    found += [(f"a batch of {size}, {_PLAIN}", one, _PLAIN) for one in batches if len(one) == size]
    return found


def _span_scores(
    exposure: Exposure,
    setting: str,
    batches: Sequence[Texts],
    apart: Tensor,
    vocabulary: Tensor,
    confidence: float,
) -> list[Score]:
    """Recall and precision of what lies in the span, and precision of the nearest; tokens of all texts aside."""
    public = exposure.public
    known = set(torch.cat([torch.tensor(part) for part in exposure.frame if part]).tolist())
    counts = torch.bincount(public.truth, minlength=len(vocabulary))
    frequent = counts.argsort(descending=True, stable=True)
    counted: dict[str, list[tuple[int, int]]] = {
        name: [] for name in ("recall", "precision", "top", "guess")
    }
    for texts, distance in zip(batches, apart, strict=True):
        ids = texts.examples.inputs
        real = torch.arange(ids.shape[1]) < texts.lengths.unsqueeze(1)
        truth = set(ids[real].tolist()) - known
        kept = torch.tensor([token not in known for token in vocabulary.tolist()])
        named = set(in_span(distance[kept], vocabulary[kept]).tolist())
        top = set(closest(distance[kept], vocabulary[kept], len(truth)).tolist())
        guess = [token for token in frequent.tolist() if token not in known][: len(truth)]
        counted["recall"].append((len(named & truth), len(truth)))
        counted["precision"].append((len(named & truth), len(named)))
        counted["top"].append((len(top & truth), len(truth)))
        counted["guess"].append((len(set(guess) & truth), len(truth)))
    guessed, tried = zip(*counted["guess"], strict=True)
    baseline = sum(guessed) / max(1, sum(tried))
    found = []
    for name, attack, measure, meaning in (
        ("recall", "span check", "recall", _SPANNED),
        ("precision", "span check", "precision", _SPANNED),
        ("top", "nearest to the span", "precision", _RANKED),
    ):
        hits, trials = zip(*counted[name], strict=True)
        if not sum(trials):
            continue  # nothing was named
        value, interval = share(hits, trials, confidence)
        found.append(
            Score(
                attack=attack,
                measure=measure,
                cut=None,
                setting=setting,
                value=value,
                interval=interval,
                baseline=baseline,
                n=sum(trials),
                units=len(trials),
                meaning=meaning,
            )
        )
    return found
