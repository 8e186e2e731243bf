"""Write bench/README.md, and the short form of it in the README, from bench/results.

``python -m bench.readme`` writes both, with ``--check`` it says whether they are up to date.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.common import RESULTS

PAGE = Path(__file__).parent / "README.md"
README = PAGE.parents[1] / "README.md"
SHOWN = "8B q/o"  # the layer that stands for all in the short form
BEGIN = "<!-- figures: written by `python -m bench.readme` from bench/results -->\n"
END = "<!-- end of figures -->"
STEPS = (
    "Whole training steps (`python -m bench.train`): AdamW, 4 x 256 tokens, LoRA r = 16 on every"
    " linear, adapters float32 as PEFT makes them; Llamas of random weights with a vocabulary of"
    " 8,192, so that head and loss weigh less than in a real 1B model. The same PEFT script with"
    " and without `patch_model(model)`; `nf4-dense` is fastlora's own NF4 against PEFT on dense"
    " weights; `generate` is greedy, one sequence."
)
Row = dict[str, Any]
RUN = ("model", "method", "how", "quantize", "seed")  # which runs are the same one again


def latest(name: str, field: str = "date") -> list[Row]:
    """The rows of the newest run in a results file, or of all runs with its commit."""
    rows = everything(name)
    return [row for row in rows if row[field] == rows[-1][field]]


def by_machine(name: str, field: str = "date") -> list[list[Row]]:
    """The rows of the newest run of each machine and dtype in a results file, or of its commit."""

    def kind(row: Row) -> tuple[str, str]:
        return row["device"], row.get("dtype", "bfloat16")

    rows = everything(name)
    newest = {kind(row): row[field] for row in rows}  # the last row of each wins
    return [[row for row in rows if (kind(row), row[field]) == run] for run in newest.items()]


def last(rows: list[Row], *fields: str) -> list[Row]:
    """The newest row of each combination of these fields, in the order of the first."""
    return list({tuple(row.get(field) for field in fields): row for row in rows}.values())


def where(row: Row) -> str:
    """On what a row was measured."""
    return (
        f"{row['device']} ({row['isa']}), torch {row['torch']}, bitsandbytes"
        f" {row['bitsandbytes']}, PEFT {row['peft']}; {row.get('dtype', 'bfloat16')}"
    )


def linears(rows: list[Row]) -> list[str]:
    """What was measured where, and the table."""
    first = rows[0]
    return [
        f"{where(first)}, adapters {first['adapter_dtype']}, r = 16, NF4 double-quantised; commit"
        f" {first['commit']}:",
        "\n".join(speed(rows)),
    ]


def speed(rows: list[Row]) -> list[str]:
    """A table of medians and ratios: one line per shape, pass and number of tokens."""
    cells: dict[tuple[str, str, int], dict[str, float]] = {}
    for row in rows:
        key = (row["shape"], row["pass"], row["M"])
        cells.setdefault(key, {})[row["variant"]] = row["ms_p50"]
    sizes = {row["shape"]: f"{row['N']} x {row['K']}" for row in rows}
    lines = [
        "| layer, N x K | tokens | pass | dense torch | dense + LoRA | PEFT + bnb nf4"
        " | fastlora nf4 | to dense | to dense + LoRA | to PEFT + bnb |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (shape, mode, m), ms in cells.items():
        wanted = m in (1, 16, 64) if mode == "forward" else m in (256, 1024)
        if not wanted:
            continue
        ours = ms["fastlora nf4"]
        peers = [ms[name] for name in ("dense", "dense+lora", "peft+bnb")]
        times = " | ".join(f"{value:.2f}" for value in [*peers, ours])
        ratios = " | ".join(f"{value / ours:.2f}" for value in peers)
        lines.append(f"| {shape}, {sizes[shape]} | {m} | {mode} | {times} | {ratios} |")
    return lines


def memory(rows: list[Row]) -> list[str]:
    """Peak extra bytes of the largest batch, per shape."""
    most = max(row["M"] for row in rows)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    table = {(r["shape"], r["variant"]): r["bytes"] for r in rows if r["M"] == most}
    lines = [
        f"| layer | dense bf16 weight | {' | '.join(variants)} |",
        "|---" * (len(variants) + 2) + "|",
    ]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        row = next(row for row in rows if row["shape"] == shape)
        sizes = [2 * row["N"] * row["K"], *(table[shape, variant] for variant in variants)]
        lines.append(f"| {shape} | {' | '.join(f'{size / 2**20:.1f}' for size in sizes)} |")
    return lines


def engines(rows: list[Row]) -> list[str]:
    """What was measured where, and the table of the methods."""
    first = rows[0]
    title = f"{where(first)}, adapters {first['adapter_dtype']}; commit {first['commit']}:"
    return [title, "\n".join(methods(rows))]


def methods(rows: list[Row]) -> list[str]:
    """A table of the adapter methods, groups and batches: forward + backward."""
    lines = [
        "| layer | tokens | what | ms | against | ms | times |",
        "|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["shape"], row["M"]), {}).setdefault(row["variant"], row["ms_p50"])
    pairs = [(v, p) for v in ("loha", "lokr", "dora") for p in (f"peft {v}", "lora")]
    pairs += [("group", "one by one")]
    pairs += [(v, "one adapter") for v in ("8 adapters", "8 adapters, unsorted rows")]
    for (shape, m), ms in cells.items():
        for ours, other in pairs:
            if ours in ms and other in ms:
                figures = f"{ms[ours]:.2f} | {other} | {ms[other]:.2f} | {ms[other] / ms[ours]:.2f}"
                lines.append(f"| {shape} | {m} | {ours} | {figures} |")
    return lines


def training(rows: list[Row]) -> list[str]:
    """A table of whole training steps with and without the line, and what lies around them."""
    lines = [
        "| case | before, tokens/s | with fastlora | times | peak MiB before | with |",
        "|---|---|---|---|---|---|",
    ]
    around = []
    for row in rows:
        if "seconds" in row:
            around.append(f"{row['name']} {row['seconds']} s (at most {row['at_most']})")
            continue
        peaks = [row.get(f"{v}_peak") for v in ("other", "ours")]
        memory = " | ".join("" if peak is None else f"{peak / 2**20:.0f}" for peak in peaks)
        speed = f"{row['other_tokens_s']:.1f} | {row['ours_tokens_s']:.1f} | {row['times']:.2f}"
        lines.append(f"| {row['name']} | {speed} | {memory} |")
    return [*lines, "", f"{'; '.join(around)}."] if around else lines


def whole_steps() -> list[str]:
    """For each machine what was measured where, and the table of training steps."""
    parts = []
    for rows in by_machine("train-cpu", "commit"):
        parts += [f"{where(rows[0])}; commit {rows[0]['commit']}:", "\n".join(training(rows))]
    return parts


def everything(name: str) -> list[Row]:
    """All rows of a results file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def mean(rows: list[Row], key: str) -> str:
    """The mean of a figure over seeds, with the standard deviation where there are several."""
    values = [row[key] for row in rows]
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def strategies(rows: list[Row]) -> list[str]:
    """A table of the strategies on real text: accuracy and size, over seeds."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["how"], row.get("quantize") or ""), []).append(row)
    lines = [
        "| method | how | base | seeds | accuracy | trained parameters | saved MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, how, stored), found in groups.items():
        trained = found[0].get("trainable_parameters")
        saved = found[0].get("checkpoint_bytes")
        sizes = f"{trained:,} | {saved / 2**20:.2f}" if trained and saved else " | "
        lines.append(
            f"| {method} | {how} | {stored or 'dense'} | {len(found)} | {mean(found, 'accuracy')}"
            f" | {sizes} |"
        )
    return lines


def strategy_times(rows: list[Row]) -> str:
    """How long steps of the command take beside those by hand."""
    parts = []
    for row in rows:
        ours, hand = row["fastlora_seconds"], row["hand_seconds"]
        parts.append(
            f"{row['method']} {ours:.1f} s against {hand:.1f} s by hand ({ours / hand:.2f}x)"
        )
    return (
        f"{rows[0]['steps']} training steps of the same, in turn, medians of {rows[0]['rounds']}:"
        f" {'; '.join(parts)}. The command batches texts of like length, which saves padding."
    )


def digits(rows: list[Row]) -> list[str]:
    """A table of the strategies on images, over seeds."""
    kinds = list(dict.fromkeys(row["model"] for row in rows))
    lines = [f"| method | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [[r for r in rows if (r["model"], r["method"]) == (k, method)] for k in kinds]
        cells = [mean(found, "accuracy") if found else "" for found in chosen]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    """bench/README.md as it should stand."""
    runs, extra = by_machine("linear-cpu"), latest("linear-memory-cpu")
    parts = [
        "# Figures",
        "Written by `python -m bench.readme` from the files in [results](results), to which each"
        " script appends what it measured. Everything is on CPUs: no GPU has been measured yet.",
        "## One layer",
        "One LoRA linear, all variants interleaved in one process, medians in ms (`python -m"
        " bench.linear`). The last three columns are how many times faster fastlora is.",
        *(part for rows in runs for part in linears(rows)),
        "Peak extra memory of one forward + backward beyond its inputs and outputs, MiB, at"
        f" {max(row['M'] for row in extra)} tokens (`python -m bench.linear --memory`):",
        "\n".join(memory(extra)),
        "## Every method",
        "Every method on NF4, forward + backward (`python -m bench.engine`). LoRA and DoRA have"
        " r = 16, LoHa and LoKr r = 8, LoKr factor 8. PEFT's LoHa and LoKr run on a dense weight,"
        " which is all they can, its DoRA on bitsandbytes NF4. Times: how many times faster.",
        *(part for rows in by_machine("engine-cpu") for part in engines(rows)),
        "## Whole training steps",
        STEPS,
        *whole_steps(),
        "## Strategies",
        "`fastlora train` on a real task (`python -m bench.strategies`): which of ten packages of"
        " the standard library does a paragraph of documentation belong to? 2,000 training texts,"
        " 500 test texts, the pre-trained all-MiniLM-L6-v2, 3 epochs; by hand is the same with"
        " transformers and PEFT alone; scratch is the architecture without its pre-training.",
        "\n".join(strategies(last(everything("strategies"), *RUN))),
        "Of a run made twice the later counts, so rows come from two machines and several commits"
        " (see the file). From scratch one seed is much worse than the others. `seconds` in the"
        " file were measured beside other work, some while the run was stopped; times are below.",
        strategy_times(latest("strategies-time", "commit")),
        "Images (`python -m bench.digits`): small models pre-trained to tell the digits 0-4 and by"
        " how many quarter turns they are turned, then 5-9 from 20 images each; accuracy on 300"
        " test images, three seeds.",
        "\n".join(digits(last(everything("digits"), *RUN))),
        "Learning rates, adapters, the ResNet's blocks and the task of the pre-training were chosen"
        " with these test images in view, so the figures flatter a little. The ResNet's scratch had"
        " the best of four rates, the ViT's only one. A smaller ResNet pre-trained on the digits"
        " alone, whose rows are in the file too, did no better than from scratch.",
    ]
    return "\n\n".join(parts) + "\n"


def ratios(rows: list[Row]) -> list[str]:
    """A table of how many times faster fastlora is: one line per pass and number of tokens."""
    cells: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        cells.setdefault((row["pass"], row["M"]), {})[row["variant"]] = row["ms_p50"]
    lines = [
        "| tokens | pass | fastlora, ms | dense torch | dense + LoRA | PEFT + bitsandbytes |",
        "|---|---|---|---|---|---|",
    ]
    for (mode, m), ms in cells.items():
        if m in (1, 16, 64) if mode == "forward" else m in (256, 1024):
            ours, peers = ms["fastlora nf4"], ("dense", "dense+lora", "peft+bnb")
            times = " | ".join(f"{ms[peer] / ours:.2f}x" for peer in peers)
            lines.append(f"| {m} | {mode} | {ours:.2f} | {times} |")
    return lines


def short() -> str:
    """The README's section as it should stand."""
    parts = [
        "How many times faster one NF4 linear with LoRA of an 8B Llama is (4096 x 4096, r = 16),"
        " all variants interleaved in one process, medians (`python -m bench.linear`):"
    ]
    for rows in by_machine("linear-cpu"):
        shown = [row for row in rows if row["shape"] == SHOWN]
        if any(row["pass"] != "forward" for row in shown):
            parts += [f"{where(shown[0])}; commit {shown[0]['commit']}:", "\n".join(ratios(shown))]
    parts += [
        STEPS,
        *whole_steps(),
        agreement(last(everything("strategies"), *RUN)),
        "All figures, with the commands that made them: [bench/README.md](bench/README.md).",
    ]
    return "\n\n".join(parts) + "\n"


def agreement(rows: list[Row]) -> str:
    """The accuracy of the command beside that of scripts by hand."""
    parts = []
    for method in ("full", "partial", "lora"):
        chosen = [row for row in rows if row["method"] == method and not row.get("quantize")]
        ours = mean([row for row in chosen if row["how"] == "fastlora"], "accuracy")
        hand = mean([row for row in chosen if row["how"] == "by hand"], "accuracy")
        parts.append(f"{method} {ours} against {hand}")
    stored = mean([row for row in rows if row.get("quantize") == "nf4"], "accuracy")
    scratch = mean([row for row in rows if row["method"] == "scratch"], "accuracy")
    return (
        "Accuracy of `fastlora train` on a real task, against scripts of transformers and PEFT by"
        f" hand, mean and spread over seeds: {'; '.join(parts)}; lora on NF4 {stored}; the"
        f" architecture from scratch {scratch} (`python -m bench.strategies`)."
    )


def main() -> int:
    """Write both, or with --check say whether they are up to date."""
    text = README.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = {README: f"{before}{BEGIN}\n{short()}\n{END}{after}", PAGE: page()}
    if "--check" not in sys.argv:
        for path, new in wanted.items():
            path.write_text(new)
        return 0
    stale = [path for path, new in wanted.items() if not path.is_file() or path.read_text() != new]
    for path in stale:
        print(f"{path} is not what bench/results says: run `python -m bench.readme`.")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
