"""`fastlora tune`: measure, print and store the table of this GPU."""

from __future__ import annotations

import torch
from fastlora_kernels.regimes import Plan

from fastlora import tune
from fastlora.train.refusal import Refusal


def run(show: bool) -> None:
    """Measure this GPU and store the table; with `show`, say which one is in force.

    Raises:
        Refusal: there is no GPU.
    """
    from rich.console import Console
    from rich.table import Table

    if not torch.cuda.is_available():
        raise Refusal("tune needs a CUDA device, found none; run it on the machine with the GPU")
    device, console = torch.device("cuda", torch.cuda.current_device()), Console()
    if show:
        console.print(f"{torch.cuda.get_device_name(device)}: {tune.in_force(device)}")
        return
    with console.status("measuring"):
        choices = tune.tune(device)
    table = Table("direction", "tokens up to", "fastest", "by the model", "times faster")
    for choice in choices:
        plans = (_text(choice.plan), _text(choice.default))
        table.add_row(choice.direction, str(choice.tokens), *plans, f"{choice.speedup:.2f}")
    console.print(table)
    console.print(f"stored in {tune.store(device, choices)}")


def _text(plan: Plan) -> str:
    return plan.kind if plan.tile is None else f"{plan.kind} {'x'.join(map(str, plan.tile[:3]))}"
