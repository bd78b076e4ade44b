"""The server's own update, from root data that no client has: what FLTrust holds the clients' updates against.

The server trains as a client would, with the clients' own trainer, on examples set aside for it.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from clients.resident import ResidentModel
from clients.tasks import Examples, Task
from clients.threads import one_thread
from clients.trainers import SGD, FitJob
from strategies.protocols import Job
from strategies.seeds import integer
from strategies.update import Update
from strategies.wire import ARRAYS, unpack_model

_SERVER = -1
"""The server's place among logical ids, which count from 0."""


class RootTrainer:
    """Called with a round's job, gives the update that its root data make of the job's model.

    Args:
        task: loss and metrics.
        module: the architecture; its weights come with each job.
        examples: the root data.
        trainer: how clients fit.
        seed: the run's.
    """

    def __init__(
        self,
        task: Task,
        module: Callable[[], nn.Module],
        examples: Examples,
        trainer: SGD,
        *,
        seed: int = 0,
    ) -> None:
        self._task, self._module, self._examples = task, module, examples
        self._trainer, self._seed = trainer, seed
        self._model: ResidentModel | None = None
        self._last: Update | None = None

    def __call__(self, job: Job) -> Update:
        """The update, with the sections that the trainer makes.

        Raises:
            TrainingDivergedError: the loss on the root data is not finite.
        """
        if self._last is not None and self._last.version == job.version:
            return self._last  # another attempt at the same round
        arrays = unpack_model(job.records[ARRAYS])
        if self._model is None:
            self._model = ResidentModel(self._module(), arrays, self._trainer.torch_device)
        asked = FitJob(
            client=_SERVER,
            arrays=arrays,
            broadcast={},
            examples=self._examples,
            seed=integer(self._seed, "root", job.round),
            state={},
            settings={**job.config, "server-round": job.round},
        )
        with one_thread():  # as clients train: the same bits whatever the number of threads
            fitted = self._trainer.fit_one(asked, self._model, self._task)
        self._last = Update(fitted.sections, float(fitted.num_examples), (), job.version)
        return self._last
