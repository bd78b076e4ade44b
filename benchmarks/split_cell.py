"""What one client's training holds and takes: a cell of `split_costs.py`, in a process of its own.

    python benchmarks/split_cell.py '{"folder": "models/minilm", "at": 3, "dtype": "float32"}'

Prints one line of JSON: memory over what the process held once all libraries were imported, CPU seconds of a step
(median of five, one thread), and bytes of a step on the wire. `at: 0` is the whole model, trained by the client alone.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig  # noqa: F401  # imported before memory is looked at
from torch import Tensor

from clients.lora import LoraClassifier
from clients.lora.causal import LoraCausalLM
from clients.split import SplitLora
from clients.split.turns import Batch, write_batches
from clients.trainers import AdamW

STEPS = 5


def held() -> tuple[int, int]:
    """Bytes that are resident now, and the most since the last `forget`."""
    told = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(1024 * int(told[key].split()[0]) for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def forget() -> None:
    """The most that was resident counts from now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """One cell."""
    cell = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(cell["folder"])
    causal = config.model_type == "gpt2"
    length, batch = cell.get("length", 128), cell.get("batch", 8)
    inputs = torch.randint(1, config.vocab_size - 1, (batch, length))
    forget()
    before = held()[0]
    model = made(cell, config, causal, length)
    seconds, wire = trained(model, inputs, causal, cell)
    memory = held()[1] - before
    frozen = parts_of(model)
    print(
        json.dumps(
            {
                "memory": memory,
                "seconds": seconds,
                "wire": wire,
                "frozen": frozen,
                "trained": sum(4 * p.numel() for p in model.parameters()),
            }
        )
    )


def made(cell: dict[str, Any], config: Any, causal: bool, length: int) -> Any:
    """The client's model: its half, or the whole."""
    import clients.lora.model as lora_model
    import clients.split.model as split_model

    for module in (lora_model, split_model, sys.modules["clients.lora.causal"]):
        if hasattr(module, "check_tokens"):
            module.check_tokens = lambda *_: None  # type: ignore[attr-defined]  # random ids, no tokenizer
    classes = config.vocab_size if causal else 6
    shared = ((length,), classes, config.vocab_size, 0)
    if cell["at"]:
        return SplitLora(
            *shared,
            pretrained=cell["folder"],
            at=cell["at"],
            half="lower",
            head="tokens" if causal else "classes",
            base_dtype=cell["dtype"],
        )
    return (LoraCausalLM if causal else LoraClassifier)(*shared, pretrained=cell["folder"])


def parts_of(model: Any) -> int:
    """Bytes of frozen weights."""
    hidden = next(
        getattr(model, n)
        for n in ("lower", "_encoder", "_model")
        if getattr(model, n, None) is not None
    )
    frozen = getattr(hidden, "part", hidden)
    return sum(p.numel() * p.element_size() for p in frozen.parameters() if not p.requires_grad)


def trained(model: Any, inputs: Tensor, causal: bool, cell: dict[str, Any]) -> tuple[float, int]:
    """Seconds of a step, and bytes that an activation and its gradient are."""
    trainer = AdamW(lr=1e-3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    moments, times, wire = trainer.moments(flat), [], 0
    for _ in range(STEPS):
        began = time.process_time()
        if cell["at"]:
            with torch.no_grad():  # the forward pass whose activation travels
                activation, lengths = model.lower(inputs)
            packed = write_batches(
                [Batch(activation, lengths, None)], cell.get("precision", "fp32")
            )
            wire = 2 * sum(a.nbytes for n, a in packed.items() if "activation" in n)
            del packed
            gradient = torch.randn_like(activation) / activation.numel()
            again, _ = model.lower(inputs)  # and the one whose gradient came
            found = torch.autograd.grad(again, parameters, gradient)
        else:
            logits = model(inputs)
            targets = inputs.reshape(-1) if causal else torch.zeros(len(inputs), dtype=torch.long)
            loss = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]) if causal else logits, targets
            )
            found = torch.autograd.grad(loss, parameters)
            del logits, loss
        step = torch.cat([g.reshape(-1) for g in found])
        trainer.step(flat, step, flat, None, moments)
        times.append(time.process_time() - began)
    return float(np.round(median(times), 4)), wire


if __name__ == "__main__":
    main()
