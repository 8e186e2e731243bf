"""The subcommands and their options, as typer reads them off these functions."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastlora.train import commands
from fastlora.train.options import DEVICES, METHODS, QUANTIZATIONS
from fastlora.train.options import QuickstartOptions as Options

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

RunFile = Annotated[Path, typer.Argument(help="A YAML file; fastlora init writes one.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the file's, as in train.learning_rate=1e-3."),
]
RunDirectory = Annotated[Path, typer.Argument(help="The directory of a finished run.")]


@app.callback()
def fastlora() -> None:
    """Fine-tune models on 4-bit weights with low-rank adapters."""


@app.command()
def quickstart(
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Options.steps,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = Options.rank,
    method: Annotated[str, typer.Option(help=f"{' | '.join(METHODS)}.")] = Options.method,
    quantize: Annotated[
        str, typer.Option(help=f"Storage of the frozen base: {' | '.join(QUANTIZATIONS)}.")
    ] = Options.quantize,
    output: Annotated[
        Path | None,
        typer.Option(help="Adapter directory; default: the first free runs/quickstart[-N]."),
    ] = Options.output,
    device: Annotated[str, typer.Option(help=f"{' | '.join(DEVICES)}.")] = Options.device,
    seed: Annotated[int, typer.Option(help="Seed of adapter, data order and sample.")] = (
        Options.seed
    ),
    batch_size: Annotated[int, typer.Option(help="Windows per step.")] = Options.batch_size,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = (
        Options.sequence_length
    ),
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = (
        Options.learning_rate
    ),
    backend: Annotated[str, typer.Option(help="auto, or the name of one backend.")] = (
        Options.backend
    ),
    threads: Annotated[
        int, typer.Option(help="CPU threads; 0: the fastest in a short trial.")
    ] = Options.threads,
) -> None:
    """Fine-tune the bundled model with QLoRA, on a CPU, in under two minutes."""
    from fastlora.train import quickstart as job

    job.quickstart(
        steps=steps,
        rank=rank,
        method=method,
        quantize=quantize,
        output=output,
        device=device,
        seed=seed,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        backend=backend,
        threads=threads,
    )


@app.command()
def tune(
    show: Annotated[bool, typer.Option("--show", help="Say what is stored.")] = False,
) -> None:
    """Measure which kernels are fastest on this GPU, and use them from now on."""
    from fastlora.train import tuning

    tuning.run(show)


@app.command()
def init(
    task: Annotated[str, typer.Argument(help="What is to be learnt, as in classification.")],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("run.yaml"),
) -> None:
    """Write a commented YAML file to start from."""
    commands.init(task, output, Console())


@app.command()
def train(file: RunFile, overrides: Overrides = None) -> None:
    """Fine-tune a pre-trained model on a data file, and score it against the base.

    Run the same command again to go on with a run that was interrupted.
    """
    commands.train(file, overrides or [], Console())


@app.command()
def compare(
    file: RunFile,
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option(help="Names of methods with commas between; default: all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds with commas between.")] = "0",
) -> None:
    """Train with several methods over the same data and seeds, and recommend one."""
    commands.compare(file, methods, seeds, overrides or [], Console())


@app.command(name="eval")
def evaluate(
    run: RunDirectory, data: Annotated[str, typer.Argument(help="A data file, as data.test.")]
) -> None:
    """Score a run's model on other data."""
    commands.evaluate(run, data, Console())


@app.command()
def predict(
    run: RunDirectory,
    data: Annotated[str, typer.Argument(help="A data file; the answers' column may lack.")],
    output: Annotated[
        Path | None, typer.Option(help="A .jsonl file to write; default: print.")
    ] = None,
) -> None:
    """Write a run's answer for each row of a file."""
    commands.predict(run, data, output, Console())


@app.command()
def merge(
    run: RunDirectory,
    output: Annotated[
        Path | None, typer.Argument(help="The directory to write; default: RUN/merged.")
    ] = None,
) -> None:
    """Write a run's model as a plain checkpoint that transformers loads."""
    commands.merge(run, output or run / "merged", Console())


@app.command()
def chat(run: RunDirectory) -> None:
    """Talk with a run's language model."""
    commands.chat(run, Console())


@app.command()
def doctor() -> None:
    """Say what this machine can run, on which backend, and why not more."""
    from fastlora.train import doctor as report

    report.run(Console())
