"""Several methods over the same data and seeds: one table, one page, one recommendation."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fastlora.train import charts, directory, page
from fastlora.train.arguments import resolve
from fastlora.train.children import Children
from fastlora.train.config import RunConfig, as_config
from fastlora.train.refusal import Refusal
from fastlora.train.run import Interrupted
from fastlora.train.strategies import strategy
from fastlora.train.tasks import task

SETTINGS = ("learning_rate",)  # fields that each method sets for itself, if it can


@dataclass
class Line:
    """One method's results over all seeds.

    Attributes:
        method: its name.
        score: mean of the task's score on the test rows.
        spread: its standard deviation over seeds; 0 for one seed.
        base: the base's mean score.
        retained: mean similarity of the base's features before and after; None: not known.
        old: mean perplexity of data.retain before and after; None: there is no such data.
        trainable: parameters.
        bytes: of the saved weights.
        peak: bytes of memory.
        seconds: in steps.
        seeds: how many runs.
        refused: why it could not run or be scored; "" where it could.
    """

    method: str
    score: float = float("nan")
    spread: float = 0.0
    base: float = float("nan")
    retained: float | None = None
    old: tuple[float, float] | None = None
    trainable: int = 0
    bytes: int = 0
    peak: int = 0
    seconds: float = 0.0
    seeds: int = 0
    refused: str = ""


def compare(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], console: Console
) -> list[Line]:
    """Run every method with every seed, each in its own process, and write table and page.

    Finished runs of the same config are taken as they are, so an interrupted comparison goes on.

    Args:
        config: of all runs; its `adapter` section is for its own method alone.
        methods: names.
        seeds: of data split, head, adapter and order.
        console: where the table goes.

    Raises:
        Refusal: a method is unknown, a finished run is of another config, or no method could run.
        Interrupted: a signal came.
    """
    kind, output = task(config.task), config.output
    wanted = {
        method: [config_of(config, method, seed, output / f"{method}-{seed}") for seed in seeds]
        for method in methods
    }
    if output.exists() and not output.is_dir():
        raise Refusal(f"output must be a directory, but {output} is a file; choose another")
    with directory.locked(output):
        for runs in wanted.values():
            _check_finished(runs)
        lines = _lines(wanted, kind.metric, console)
        done = [line for line in lines if not line.refused]
        if not done:
            first = lines[0]
            raise Refusal(
                f"at least one method must run, but none did; {first.method}: {first.refused}"
            )
        advice = recommend(done, kind.greater, kind.metric)
        _show(lines, kind.metric, advice, console)
        rows = {"metric": kind.metric, "greater": kind.greater, "recommended": advice}
        content = {**rows, "methods": [asdict(line) for line in lines]}
        directory.write_json(output / "comparison.json", content)
        directory.write_whole(output / "comparison.html", _page(lines, kind.metric, advice, config))
    return lines


def config_of(config: RunConfig, method: str, seed: int, place: Path) -> RunConfig:
    """Return the config of one run of a comparison, with its defaults written out.

    Raises:
        Refusal: the method is unknown, or the section `train` is wrong.
    """
    content = config.as_dict()
    train = {**content.get("train", {}), "seed": seed}
    if method != config.method:
        content.pop("adapter", None)
        train = {key: value for key, value in train.items() if key not in SETTINGS}
    if not strategy(method).freezes:
        content.pop("quantize", None)
    content.update(method=method, output=str(place), train=train)
    return resolve(as_config(content, f"the run {place.name}"))


def _check_finished(runs: Sequence[RunConfig]) -> None:
    """Raise unless the runs that are finished already are of these configs."""
    for run in runs:
        file = run.output / directory.CONFIG
        if not (run.output / directory.METRICS).is_file():
            continue
        differ = directory.differences(file, run) if file.is_file() else [directory.CONFIG]
        if differ:
            raise Refusal(
                f"finished runs must be of this config to be compared, but {run.output} differs in"
                f" {', '.join(differ)}; choose another output, or remove it"
            )


def _lines(wanted: Mapping[str, Sequence[RunConfig]], metric: str, console: Console) -> list[Line]:
    lines = []
    children = Children()
    with children.listening():
        for method, runs in wanted.items():
            with console.status(f"{method}: {len(runs)} seeds"):
                line = _line(method, runs, metric, children)
            lines.append(line)
            result = line.refused or f"{metric} {line.score:.4f}"
            console.print(f"{method}: {result}", highlight=False, soft_wrap=True, markup=False)
    return lines


def _line(method: str, runs: Sequence[RunConfig], metric: str, children: Children) -> Line:
    found = []
    for run in runs:
        metrics = run.output / directory.METRICS
        reason = "" if metrics.is_file() else _run(run, children)
        if reason:
            return Line(method, refused=f"could not run: {reason}")
        found.append(directory.read_json(metrics))
        if found[-1]["tuned"][metric] is None:
            return Line(
                method, refused=f"could not be scored: {metric} of seed {run.seed} is not finite"
            )
    scores = [run["tuned"][metric] for run in found]
    bases = [run["base"][metric] for run in found if run["base"][metric] is not None]
    kept = [run["retained"] for run in found if run.get("retained") is not None]
    return Line(
        method,
        statistics.fmean(scores),
        statistics.stdev(scores) if len(scores) > 1 else 0.0,
        statistics.fmean(bases) if bases else float("nan"),
        statistics.fmean(kept) if kept else None,
        _old(found),
        found[0]["trainable_parameters"],
        found[0]["checkpoint_bytes"],
        max(run["peak_memory_bytes"] for run in found),
        statistics.fmean(run["train_seconds"] for run in found),
        len(found),
    )


def _old(found: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    all_pairs = [run["retain_perplexity"] for run in found if run.get("retain_perplexity")]
    pairs = [pair for pair in all_pairs if None not in pair.values()]
    if not pairs:
        return None
    before, after = (statistics.fmean(pair[key] for pair in pairs) for key in ("before", "after"))
    return before, after


def _run(run: RunConfig, children: Children) -> str:
    """Run one method in a process of its own; return why it could not, or "".

    Raises:
        Interrupted: a signal came.
    """
    file = run.output.parent / f"{run.output.name}.yaml"
    text = yaml.safe_dump(run.as_dict(), sort_keys=False, allow_unicode=True)
    directory.write_whole(file, text)
    status, errors = children.run([sys.executable, "-m", "fastlora", "train", str(file)])
    if children.signal is not None:
        raise Interrupted(
            f"interrupted; what was done is saved in {run.output.parent}; run the same command"
            " again to go on",
            128 + children.signal,
        )
    if status == 0:
        return ""
    said = [line for line in errors.splitlines() if line.startswith("fastlora: ")]
    return said[-1].removeprefix("fastlora: ") if said else f"exit status {status}"


def recommend(lines: Sequence[Line], greater: bool, metric: str) -> str:
    """Return which method to take, and why: the cheapest that is as good as the best.

    As good is within one standard deviation of the best, or within 1 % of it.
    """
    sign = 1 if greater else -1
    best = max(lines, key=lambda line: sign * line.score)
    margin = max(best.spread, 0.01 * abs(best.score))
    close = [line for line in lines if sign * (best.score - line.score) <= margin]
    chosen = min(close, key=lambda line: (line.bytes, line.peak))
    if chosen is best:
        return (
            f"{best.method}: it has the best {metric}, {best.score:.4g}, and none cheaper is near"
        )
    return (
        f"{chosen.method}: its {metric} of {chosen.score:.4g} is within {margin:.2g} of the best"
        f" ({best.method}, {best.score:.4g}), and it saves {chosen.bytes / 2**20:.2f} MiB"
        f" instead of {best.bytes / 2**20:.2f}"
    )


def _cells(line: Line) -> list[str]:
    if line.refused:
        return [line.method, line.refused, *[""] * 6]
    spread = f" ± {line.spread:.3f}" if line.seeds > 1 else ""
    kept = "" if line.retained is None else f"{line.retained:.3f}"
    if line.old is not None:
        kept += f" ({line.old[0]:.2f} → {line.old[1]:.2f})"
    return [
        line.method, f"{line.score:.4f}{spread}", f"{line.base:.4f}", kept, f"{line.trainable:,}",
        f"{line.bytes / 2**20:.2f}", f"{line.peak / 2**20:,.0f}", f"{line.seconds:.1f}",
    ]  # fmt: skip


_HEADER = ("method", "score", "base", "base kept", "trained", "saved, MiB", "peak, MiB", "seconds")


def _show(lines: Sequence[Line], metric: str, advice: str, console: Console) -> None:
    table = Table(*_HEADER, title=f"{metric} on the test rows")
    for line in lines:
        table.add_row(*_cells(line))
    console.print(table)
    console.print(f"Recommended: {advice}.", highlight=False, soft_wrap=True)


def _page(lines: Sequence[Line], metric: str, advice: str, config: RunConfig) -> str:
    done = [line for line in lines if not line.refused]
    rows: list[tuple[str, float, float | None]] = [
        (line.method, line.score, line.spread if line.seeds > 1 else None) for line in done
    ]
    times: list[tuple[str, float, float | None]] = [(x.method, x.seconds, None) for x in done]
    sizes: list[tuple[str, float, float | None]] = [
        (line.method, line.bytes / 2**20, None) for line in done
    ]
    parts: list[Any] = [
        f'<p class="soft">{escape(f"{config.task} on {config.model}")}</p>',
        f"<p><b>Recommended:</b> {escape(advice)}.</p>",
        f"<h2>{escape(metric)} on the test rows</h2>", charts.bars(rows, metric),
        "<h2>Seconds in steps</h2>", charts.bars(times, "seconds"),
        "<h2>Saved weights, MiB</h2>", charts.bars(sizes, "MiB"),
        "<h2>All figures</h2>", page.table(_HEADER, [_cells(line) for line in lines]),
        '<p class="soft">base kept: mean cosine between what the pre-trained body gives for the'
        " same inputs before and after, 1 is no change; in brackets the perplexity of"
        " data.retain</p>",
    ]  # fmt: skip
    return page.document("Methods compared", "".join(parts))
