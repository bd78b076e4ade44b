"""Flower as a back end: its own SuperLink per run, simulated or deployed, and nothing left over."""

from fl_app.flower.deployment import Deployment
from fl_app.flower.link import SuperLink, run_flower
from fl_app.flower.processes import FlowerError

__all__ = ["Deployment", "FlowerError", "SuperLink", "run_flower"]
