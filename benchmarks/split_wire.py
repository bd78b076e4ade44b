"""What crosses the cut of a split model: bytes, milliseconds and error of one text of 128 tokens, by precision.

    python benchmarks/split_wire.py                      # a few seconds; MiniLM's own activations where they are there
    python benchmarks/split_wire.py --runs 1001

One process and one thread, medians. Precisions and a copy in memory take turns, so that what else the machine does
strikes them alike; the clock is the thread's own. Encoding is from a tensor to Flower's arrays, decoding from those to
a tensor, every check of a peer's bytes included. Bytes are those of the whole serialised message, of one tensor.

Activations of 384 are MiniLM's behind its third block, of random words, and their gradients those of the mean square of
what comes out; of 768, and where MiniLM is not there, normal numbers, with a hundredth of the features thirty times
as large, as models of some size have them (Dettmers et al. 2022, "LLM.int8()", §3.2).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import get_args

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch  # noqa: E402 - the libraries read their number of threads as they are loaded
from common import versions  # noqa: E402
from torch import Tensor  # noqa: E402

from clients.fetch import MINILM, is_whole  # noqa: E402
from clients.split import cut  # noqa: E402
from clients.split.coding import Precision, decode, encode, relative_error  # noqa: E402
from strategies.records import bundle  # noqa: E402
from strategies.sizes import count_bytes  # noqa: E402
from strategies.wire import pack_model, unpack_model  # noqa: E402

TOKENS, SEED = 128, 1
FOLDER = Path(__file__).resolve().parent.parent / "models" / "minilm"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def drawn(hidden: int) -> Tensor:
    """Normal numbers with a few large features, (1, 128, hidden)."""
    generator = torch.Generator().manual_seed(SEED)
    tensor = torch.randn(1, TOKENS, hidden, generator=generator)
    tensor[..., torch.randperm(hidden, generator=generator)[: hidden // 100]] *= 30
    return tensor


def minilm() -> tuple[Tensor, Tensor]:
    """MiniLM's activation behind its third block, and its gradient, (1, 128, 384) each."""
    bottom, top = cut(str(FOLDER), at=3)
    ids = torch.randint(1_000, 30_000, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        activation = bottom.eval()(input_ids=ids, attention_mask=mask)
    leaf = activation.clone().requires_grad_()
    top.eval()(leaf, attention_mask=mask).last_hidden_state.square().mean().backward()
    return activation, leaf.grad


def table(what: str, tensor: Tensor, runs: int) -> None:
    """All precisions on one tensor."""
    shape = tuple(tensor.shape)
    taken: dict[str, list[tuple[float, float]]] = {precision: [] for precision in PRECISIONS}
    sizes, errors, copies = {}, {}, []
    for _ in range(runs + 1):
        began = time.thread_time()
        tensor.clone()
        copies.append(time.thread_time() - began)
        for precision in PRECISIONS:
            began = time.thread_time()
            record = pack_model(encode(tensor, precision))
            encoded = time.thread_time()
            back = decode(unpack_model(record), precision, shape)
            taken[precision].append((encoded - began, time.thread_time() - encoded))
            if precision not in sizes:
                sizes[precision] = count_bytes(bundle({"split": record}))
                errors[precision] = relative_error(tensor, back)
    print(f"\n### {what}; a copy takes {1e3 * median(copies[1:]):.3f} ms\n")
    print("| precision | bytes | of fp32 | encode, ms | decode, ms | relative error |")
    print("| --- | --: | --: | --: | --: | --: |")
    for precision, times in taken.items():
        up, down = (1e3 * median(column) for column in zip(*times[1:], strict=True))
        share = sizes[precision] / sizes["fp32"]
        print(
            f"| {precision} | {sizes[precision]:,} | {share:.1%} | {up:.3f} | {down:.3f} "
            f"| {errors[precision]:.1e} |"
        )


def main() -> None:
    """Prints one table a tensor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=201)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    print(versions(), f"{runs} runs, seed {SEED}; load {os.getloadavg()[0]:.2f} before")
    if is_whole(FOLDER, MINILM):
        activation, gradient = minilm()
        table("activation of MiniLM, 128 x 384", activation, runs)
        table("its gradient, 128 x 384", gradient, runs)
    else:
        table("normal numbers and a few large features, 128 x 384", drawn(384), runs)
    table("normal numbers and a few large features, 128 x 768", drawn(768), runs)


if __name__ == "__main__":
    main()
