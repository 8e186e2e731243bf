"""report.html: one self-contained page on a run or a comparison, in light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastlora.train import charts
from fastlora.train.tasks.base import Evaluation

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d9dee6;
  --paper: #ffffff; --panel: #f5f7fa; --s0: #2563eb; --s1: #d97706; --s2: #059669; --s3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #353d49;
  --paper: #14181f; --panel: #1d232c; --s0: #6ea0ff; --s1: #f5b35a;
  --s2: #4fd1a1; --s3: #c59bff; } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.soft, td.soft { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
td.n, th.n { text-align: right; }
svg { width: 100%; max-width: 44rem; display: block; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); } svg polyline { fill: none; stroke-width: 1.8; }
svg .spread { stroke: var(--ink); stroke-width: 1.5; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); }
polyline.s2 { stroke: var(--s2); } polyline.s3 { stroke: var(--s3); }
circle.s0, rect.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); }
circle.s2 { fill: var(--s2); } circle.s3 { fill: var(--s3); }
.legend span { margin-right: 1.2rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px;
  margin-right: .35rem; }
i.s0 { background: var(--s0); } i.s1 { background: var(--s1); } i.s2 { background: var(--s2); }
i.s3 { background: var(--s3); }
td.heat { text-align: right; color: var(--ink); }
pre { background: var(--panel); padding: .7rem; overflow-x: auto; white-space: pre-wrap; }
"""


def run_page(
    metrics: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    before: Evaluation,
    after: Evaluation,
    data: Sequence[str],
    patch: Mapping[str, Any] | None,
) -> str:
    """Return the page on a run.

    Args:
        metrics: the content of metrics.json.
        log: the rows of the log, one per step.
        evaluations: rows of the Trainer's log that have validation scores.
        before: the base's scores on the test rows.
        after: the tuned model's.
        data: what was found in the data.
        patch: fastlora's report; None: nothing was patched.
    """
    stored = f", base in {metrics['quantize']}" if metrics["quantize"] else ""
    title = f"{metrics['method']} on {metrics['task']}"
    parts = [
        f'<p class="soft">{escape(metrics["model"] + stored)}; seed {metrics["seed"]}</p>',
        "<h2>Base against tuned, test rows</h2>",
        _scores(before.scores, after.scores),
        "<h2>Loss</h2>",
        charts.curves(_loss_series(log, evaluations), "step", "loss"),
        *_validation(evaluations),
        *_confusion(after),
        *_samples(before, after),
        "<h2>Cost</h2>",
        _facts(metrics),
        "<h2>Data</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in data) + "</ul>",
        *_patch(patch),
    ]
    return document(title, "".join(parts))


def document(title: str, body: str) -> str:
    """Return a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table; numbers are set on the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return f"<td>{escape(str(value) if value is not None else '')}</td>"
    return (
        f'<td class="n">{value:,}</td>'
        if isinstance(value, int)
        else f'<td class="n">{value:.4g}</td>'
    )


def _scores(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows = [
        [name, before.get(name, float("nan")), value, value - before.get(name, float("nan"))]
        for name, value in after.items()
    ]
    return table(["score", "base", "tuned", "change"], rows)


def _loss_series(
    log: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> list[charts.Series]:
    steps = [(float(r["step"]), float(r["loss"])) for r in log if r.get("loss") is not None]
    valid = [(float(r["step"]), float(r["eval_loss"])) for r in evaluations]
    return [("training", thin(steps)), ("validation", valid)]


def thin(points: list[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """Return at most so many points, each the mean of its neighbours."""
    size = -(-len(points) // most) if points else 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(g[-1][0], sum(y for _, y in g) / len(g)) for g in groups]


def _validation(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [k for k in (evaluations[-1] if evaluations else {}) if k.startswith("eval_")]
    shown = [n for n in names if n not in ("eval_loss", "eval_perplexity", "eval_mse")]
    series = [
        (n.removeprefix("eval_"), [(float(r["step"]), float(r[n])) for r in evaluations if n in r])
        for n in shown
    ]
    return ["<h2>Validation scores</h2>", charts.curves(series, "step", "score")] if series else []


def _confusion(after: Evaluation) -> list[str]:
    if after.confusion is None or len(after.classes) > 40:
        return []
    head = "".join(f'<th class="n">{escape(name)}</th>' for name in after.classes)
    rows = []
    for name, counts in zip(after.classes, after.confusion, strict=True):
        total = max(sum(counts), 1)
        cells = "".join(
            f'<td class="heat" style="background: color-mix(in srgb, var(--s0)'
            f' {round(70 * count / total)}%, transparent)">{count or ""}</td>'
            for count in counts
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    return [
        "<h2>Confusion matrix, tuned</h2>",
        '<p class="soft">rows: the truth; columns: the prediction</p>',
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>',
    ]


def _samples(before: Evaluation, after: Evaluation) -> list[str]:
    if not after.samples:
        return []
    old = {(prompt, truth): given for prompt, truth, given in before.samples}
    parts = ["<h2>Samples, before and after</h2>"]
    for prompt, truth, given in after.samples:
        texts = (
            ("input", prompt),
            ("expected", truth),
            ("base", old.get((prompt, truth), "")),
            ("tuned", given),
        )
        lines = [f"{name}: {text}" for name, text in texts if text]
        parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")
    return parts


def _facts(metrics: Mapping[str, Any]) -> str:
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    rate = metrics["tokens_per_second"]
    rows = [
        ["trained parameters", f"{trained:,} of {total:,} ({trained / max(total, 1):.2%})"],
        ["steps", f"{metrics['steps']:,}, of which {metrics['skipped_steps']} were skipped"],
        ["time in steps", f"{metrics['train_seconds']:.1f} s"],
        ["throughput", f"{rate:,.0f} tokens (or images) per second" if rate else "unknown"],
        ["peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB"],
        ["saved", f"{metrics['checkpoint_bytes'] / 2**20:,.2f} MiB"],
        ["device", metrics["device"]],
        ["versions", ", ".join(f"{k} {v}" for k, v in metrics["versions"].items())],
    ]
    return table(["", ""], rows)


def _patch(patch: Mapping[str, Any] | None) -> list[str]:
    if patch is None:
        return []
    header = ["module", "method", "r", "format", "backend", "notes"]
    rows = [[row.get(key) for key in header] for row in patch["modules"]]
    parts = [
        "<h2>Patched layers</h2>",
        "<details><summary>",
        f"{len(rows)} linears</summary>",
        table(header, rows),
        "</details>",
    ]
    if patch["skipped"]:
        skipped = [[name, reason] for name, reason in patch["skipped"].items()]
        parts += [
            "<details><summary>",
            f"{len(skipped)} left as they are</summary>",
            table(["module", "why"], skipped),
            "</details>",
        ]
    return parts
