"""Membership inference on a run's final model: which examples was it trained on?

* **loss** (Yeom, Giacomelli, Fredrikson, Jha 2018, "Privacy Risk in Machine Learning", Adversary 1): a smaller loss
  says member.
* **lira** (Carlini et al. 2022, "Membership Inference Attacks From First Principles", Algorithm 1, online): shadow
  models that had an example and shadow models that had not give two normal laws of φ = log(p / (1 − p)), p the
  probability of the example's label; the score is the log-likelihood ratio of the run's own φ. With few shadows the
  variances are pooled over examples, as in §VI; an example that no shadow had (or all) takes the mean distance of the
  two laws from the others.

Members are the examples that clients train on; others are the central test set and the clients' test parts. The bound
on ε treats examples as tried one by one. They are not, there is one model: for the claim of one run it is an estimate,
not a proof, and the canaries are the audit that has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from clients.tasks import Examples
from clients.tasks.task import UNLABELLED
from fl_app.audit.ranking import Ranking, rank
from fl_app.audit.shadows import Shadow, is_cross_entropy, losses, shadows, trained_rows
from fl_app.audit.target import Target
from fl_app.audit.training import AuditError, Progress
from fl_app.config.faults import ConfigError, Fault
from strategies.seeds import generator

_LEAST_LOSS = 1e-300
"""p = 1 has no φ."""


@dataclass(frozen=True)
class Membership:
    """What the attacks came to.

    Attributes:
        loss: of the loss attack.
        lira: of the likelihood-ratio attack; None without shadows.
        shadows: how many shadow models there were.
    """

    loss: Ranking
    lira: Ranking | None
    shadows: int

    def to_dict(self) -> dict[str, Any]:
        """In plain JSON types."""
        return {
            "shadows": self.shadows,
            "loss": self.loss.to_dict(),
            "lira": None if self.lira is None else self.lira.to_dict(),
        }


def audit_examples(
    target: Target, count: int, *, confidence: float, progress: Callable[[int], Progress]
) -> Membership:
    """Attacks the run's model.

    Args:
        target: the run.
        count: shadow models; 0 for the loss attack alone, else at least 2.
        confidence: in (0, 1).
        progress: for a shadow's number, what is told of its rounds.

    Raises:
        ConfigError: the run's model can't be read, or half of its examples can't be cut among its clients.
        AuditError: there are too few examples of either kind, or a training failed.
        ValueError: one shadow.
    """
    if count == 1 or count < 0:
        raise ValueError(f"{count} shadows: none, or at least 2, to have each example in and out")
    if count and target.assembly.task.goals:
        told = "train on goals of their own choice, and an example's own is one of several here: leave them out"
        raise ConfigError([Fault("--shadows", told, count)])
    examples, natural_ids, inside, judged = population(target)
    for name, mask in (("members", inside & judged), ("others", ~inside & judged)):
        if mask.sum() < 4:
            raise AuditError(f"there are {mask.sum()} {name}: an attack is judged on at least 4")

    def ranked(scores: NDArray[np.float64]) -> Ranking:
        return rank(
            scores[inside & judged],
            scores[~inside & judged],
            delta=target.delta("example"),
            confidence=confidence,
            rng=generator(target.config.seed, "halves"),
        )

    # The shadows first: their workers are forked, which a process that has computed much should not be.
    trained = shadows(target, examples, natural_ids, count, progress) if count else []
    own = losses(target.assembly, target.model(), examples)
    if np.isnan(own).any():
        raise AuditError(
            "the run's model gives losses that are not numbers: nothing can be attacked"
        )
    logits = is_cross_entropy(target.assembly.task)
    lira = ranked(likelihood_ratios(own, trained, logits=logits)) if count else None
    return Membership(ranked(-own), lira, count)


def population(
    target: Target,
) -> tuple[Examples, list[str] | None, NDArray[np.bool_], NDArray[np.bool_]]:
    """The examples that an attack is tried on.

    Returns:
        The task's training and test examples, n together; whose each is, where they are somebody's (then without the
        test set, whose examples are nobody's); (n,) whether clients train on it; (n,) whether it is judged, which what
        no client holds is not: the server may have made use of it. Of a task with several goals an example has the
        label of its owner's alone, which is what was trained; what nobody owns has one goal's in turn.
    """
    task, config = target.assembly.task, target.config
    own = task.train()
    natural = config.task.federation.arguments.get("partition") == "natural"
    ids = task.natural_ids() if natural else None
    test = task.test().take([]) if ids is not None else task.test()
    examples = Examples(
        torch.cat([own.inputs, test.inputs]), torch.cat([own.targets, test.targets])
    )
    inside, judged = np.zeros(len(examples), bool), np.zeros(len(examples), bool)
    inside[trained_rows(target.assembly, target.num_clients)] = True
    data = target.assembly.data(target.num_clients)
    judged[np.concatenate([data.rows(client)[1] for client in range(target.num_clients)])] = True
    judged |= inside
    judged[len(own) :] = True
    if task.goals:
        examples = _of_owners(target, examples)
    return examples, None if ids is None else list(ids), inside, judged


def _of_owners(target: Target, examples: Examples) -> Examples:
    """The examples with the labels of one goal each: their owner's, or one goal's in turn."""
    task, data = target.assembly.task, target.assembly.data(target.num_clients)
    names = tuple(task.goals)
    goal = np.arange(len(examples)) % len(names)
    for client in range(target.num_clients):
        own = task.goal_of(client)
        assert own is not None
        goal[np.concatenate(data.rows(client))] = names.index(own)
    kept = torch.from_numpy(goal).unsqueeze(1) == torch.arange(len(names))
    return Examples(examples.inputs, torch.where(kept, examples.targets, UNLABELLED))


def likelihood_ratios(
    own: NDArray[np.float64], trained: list[Shadow], *, logits: bool
) -> NDArray[np.float64]:
    """Carlini et al.'s Λ for each example: the log-likelihood ratio of in to out.

    Args:
        own: (n,) losses of the model that is attacked.
        trained: at least 2 shadows, one with and one without some example.
        logits: whether a loss is −log p; else the loss itself stands for φ.
    """
    inside = np.stack([shadow.inside for shadow in trained])
    seen = np.stack([_phi(shadow.losses, logits=logits) for shadow in trained])
    means, deviations = {}, {}
    for side, mask in ((True, inside), (False, ~inside)):
        counts = mask.sum(axis=0)
        means[side] = np.where(
            counts > 0, (seen * mask).sum(axis=0) / np.maximum(counts, 1), np.nan
        )
        errors = np.where(mask, seen - means[side], 0.0)
        freedom = max(1, int((counts - 1).clip(0).sum()))
        deviations[side] = max(float(np.sqrt((errors**2).sum() / freedom)), 1e-6)
    apart = float(np.nanmean(means[True] - means[False]))
    with_it = np.where(np.isnan(means[True]), means[False] + apart, means[True])
    without = np.where(np.isnan(means[False]), with_it - apart, means[False])
    phi = _phi(own, logits=logits)
    found: NDArray[np.float64] = _log_normal(phi, with_it, deviations[True])
    found -= _log_normal(phi, without, deviations[False])
    return found


def _phi(loss: NDArray[np.float64], *, logits: bool) -> NDArray[np.float64]:
    if not logits:
        return -loss
    held = np.maximum(loss, _LEAST_LOSS)
    return -held - np.log(-np.expm1(-held))


def _log_normal(
    x: NDArray[np.float64], mean: NDArray[np.float64], deviation: float
) -> NDArray[np.float64]:
    found: NDArray[np.float64] = -(((x - mean) / deviation) ** 2) / 2 - np.log(deviation)
    return found
