"""Differential privacy: releases as data, accountants, noise, and what a run promises."""

from strategies.privacy.budget import BudgetSpentError, ParticipationSpentError
from strategies.privacy.central import Central
from strategies.privacy.distributed import Distributed
from strategies.privacy.examples import OwnAccounts
from strategies.privacy.ftrl import Ftrl
from strategies.privacy.guarantee import Guarantee
from strategies.privacy.local import Local

__all__ = [
    "BudgetSpentError",
    "Central",
    "Distributed",
    "Ftrl",
    "Guarantee",
    "Local",
    "OwnAccounts",
    "ParticipationSpentError",
]
