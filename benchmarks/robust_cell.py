"""One cell of the comparison of robust rules: a rule on n updates of d elements, timed in this process alone.

    python benchmarks/robust_cell.py trellis median 10 1000000     # prints one line of JSON

Sides: `trellis` and `flwr` start from the bytes of Flower messages, `array` (Trellis's pure functions) and `byzfl` from
an (n, d) matrix. It runs in ByzFL's environment too, so it imports a side's packages only when that side is asked for.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

LAYERS = 10
"""Arrays of about equal size that a model of flwr's is made of."""


def tolerated(rule: str, n: int) -> int:
    """f: 20% of the updates, for Bulyan the most that it bears."""
    return (n - 3) // 4 if rule == "bulyan" else n // 5


def main() -> None:
    """Measures one cell."""
    side, rule, n, d = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    threads = int(sys.argv[5]) if len(sys.argv) > 5 else 1
    make, run = SIDES[side](rule, n, d, threads)
    seconds, extra, read = [], [], 0.0
    began = time.monotonic()
    while len(seconds) < 3 or (len(seconds) < 9 and time.monotonic() - began < 3):
        inputs = make()
        gc.collect()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start = time.perf_counter()
        result = run(inputs)
        seconds.append(time.perf_counter() - start)
        extra.append(_memory("VmHWM") - before)
        if seconds[-1] > 5:
            break
    if side == "array":
        read = min(_reading(inputs) for _ in range(5))
    found = {
        "seconds": median(seconds),
        "extra_mib": max(extra),
        "read": read,
        "runs": len(seconds),
    }
    print(json.dumps(found | {"sum": float(np.asarray(result, np.float64).sum())}))


def _memory(field: str) -> float:
    """MiB of this process, as the kernel says."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(field)).split()[1]) / 1024


def _reading(matrix: Any) -> float:
    """Seconds to read every element once: a maximum of each row."""
    start = time.perf_counter()
    for one in matrix:
        one.max()
    return time.perf_counter() - start


def _matrix(n: int, d: int) -> Any:
    matrix = np.empty((n, d), np.float32)
    for index in range(n):
        np.random.default_rng(index).standard_normal(d, dtype=np.float32, out=matrix[index])
    return matrix


Side = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Makes a run's input, and runs it."""


def _array(rule: str, n: int, d: int, threads: int) -> Side:
    from strategies.combiners import TrimmedMean, functional

    f, matrix = tolerated(rule, n), _matrix(n, d)
    side = {"threads": threads}
    rules: dict[str, Callable[[Any], Any]] = {
        "mean": functional.mean,
        "krum": lambda x: functional.krum(x, f=f),
        "multi_krum": lambda x: functional.multi_krum(x, f=f),
        "bulyan": lambda x: functional.bulyan(x, f=f, **side),
        "median": lambda x: functional.median(x, **side),
        "trimmed_mean": lambda x: functional.trimmed_mean(x, f=f, **side),
        "geometric_median": lambda x: functional.geometric_median(x, smoothing=0.1, iterations=3),
        "centered_clipping": lambda x: functional.centered_clipping(x, tau=100.0),
        "norm_bounding": lambda x: functional.norm_bounding(x),
        "fltrust": lambda x: functional.fltrust(x, root=x[0]),
        "nnm": lambda x: functional.nnm(x, f=f),
        "nnm_trimmed_mean": lambda x: functional.nnm(x, f=f, rule=TrimmedMean(), **side),
        "bucketing_trimmed_mean": lambda x: functional.bucketing(
            x, f=f // 2, rule=TrimmedMean(), **side
        ),
    }
    return lambda: matrix, rules[rule]


def _byzfl(rule: str, n: int, d: int, threads: int) -> Side:
    import byzfl
    import torch

    torch.set_num_threads(threads)
    f, matrix = tolerated(rule, n), torch.from_numpy(_matrix(n, d))
    trimmed = byzfl.TrMean(f)
    rules: dict[str, Callable[[Any], Any]] = {
        "mean": byzfl.Average(),
        "krum": byzfl.Krum(f),
        "multi_krum": byzfl.MultiKrum(f),
        "median": byzfl.Median(),
        "trimmed_mean": trimmed,
        "geometric_median": byzfl.GeometricMedian(),
        "centered_clipping": byzfl.CenteredClipping(),
        "nnm": byzfl.NNM(f),
        "nnm_trimmed_mean": lambda x: trimmed(byzfl.NNM(f)(x)),
    }
    return lambda: matrix, rules[rule]


def _trellis(rule: str, n: int, d: int, threads: int) -> Side:
    from flwr.app import Message

    from fl_app.engine.flwr_internals import claim_identity
    from strategies import Admission
    from strategies.combiners import Bulyan, Krum, Mean, Median, MultiKrum, TrimmedMean
    from strategies.protocols import Plan
    from strategies.replies import Expected, read_update, write_update
    from strategies.update import DELTA, Layout, Section, Update

    claim_identity(1)
    kinds = {"krum": Krum, "multi_krum": MultiKrum, "bulyan": Bulyan, "median": Median}
    kinds |= {"trimmed_mean": TrimmedMean}
    combiner = Mean(weighting="uniform") if rule == "mean" else kinds[rule](f=tolerated(rule, n))
    names = tuple(f"a{index}" for index in range(LAYERS))
    shapes = tuple((len(part),) for part in np.array_split(np.empty(d, np.int8), LAYERS))
    layouts, matrix = {DELTA: Layout(names, shapes)}, _matrix(n, d)

    def make() -> Any:
        messages = []
        for client in range(n):
            one = Update({DELTA: Section(matrix[client], layouts[DELTA])}, 1.0, (client,), 0)
            content = write_update(one, client=client, round_number=1)
            messages.append(Message(content, dst_node_id=0, message_type="train"))
        return messages

    def run(messages: Any) -> Any:
        admission, accumulator = Admission(), combiner.begin(Plan(layouts, n, n))
        for client, message in enumerate(messages):
            update = read_update(message.content, Expected(layouts, client, 1, 0))
            admission.admit(update)
            accumulator.add(update)
        aggregate = accumulator.result()
        assert aggregate is not None
        return aggregate.delta.vector

    return make, run


def _flwr(rule: str, n: int, d: int, threads: int) -> Side:
    import logging

    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp import strategy

    from fl_app.engine.flwr_internals import claim_identity

    logging.disable(logging.CRITICAL)
    claim_identity(1)
    f, matrix = tolerated(rule, n), _matrix(n, d)
    makers: dict[str, Callable[[], Any]] = {
        "mean": strategy.FedAvg,
        "krum": lambda: strategy.Krum(num_malicious_nodes=f),
        "multi_krum": lambda: strategy.MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f),
        "bulyan": lambda: strategy.Bulyan(num_malicious_nodes=f),
        "median": strategy.FedMedian,
        "trimmed_mean": lambda: strategy.FedTrimmedAvg(beta=f / n),
    }

    def make() -> Any:
        messages = []
        for client in range(n):
            parts = np.array_split(matrix[client], LAYERS)
            arrays = ArrayRecord({f"a{index}": Array(part) for index, part in enumerate(parts)})
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            messages.append(Message(content, dst_node_id=0, message_type="train"))
        return messages

    def run(messages: Any) -> Any:
        arrays, _ = makers[rule]().aggregate_train(1, messages)
        return np.concatenate([array.numpy() for array in arrays.values()])

    return make, run


SIDES: dict[str, Callable[[str, int, int, int], Side]] = {
    "array": _array,
    "byzfl": _byzfl,
    "trellis": _trellis,
    "flwr": _flwr,
}

if __name__ == "__main__":
    main()
