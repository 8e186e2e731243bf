"""The `fastlora` command: `fastlora quickstart --help`."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

_NEEDED = ("typer", "rich", "yaml", "pydantic", "transformers", "accelerate", "peft", "sklearn")


def main() -> None:
    """Run the command line.

    Bad input is one sentence on standard error and exit status 2.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        _refuse(f'{", ".join(missing)} not installed; run: pip install "fastlora[train]"')
    from fastlora.train.refusal import Refusal

    try:
        _app()()
    except Refusal as refusal:
        _refuse(str(refusal))


def _refuse(sentence: str) -> None:
    print(f"fastlora: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def _app() -> "typer.Typer":
    import typer

    from fastlora.train.options import DEVICES, METHODS, QUANTIZATIONS
    from fastlora.train.options import QuickstartOptions as Options

    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

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
        seed: Annotated[
            int, typer.Option(help="Seed of adapter, data order and sample.")
        ] = Options.seed,
        batch_size: Annotated[int, typer.Option(help="Windows per step.")] = Options.batch_size,
        sequence_length: Annotated[
            int, typer.Option(help="Tokens per window.")
        ] = Options.sequence_length,
        learning_rate: Annotated[
            float, typer.Option(help="Peak learning rate.")
        ] = Options.learning_rate,
        backend: Annotated[
            str, typer.Option(help="auto, or the name of one backend.")
        ] = Options.backend,
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

    _add_runs(app)
    return app


_OVERRIDES = "Values that replace the file's, as in train.learning_rate=1e-3."


def _add_runs(app: "typer.Typer") -> None:
    """Add the commands about runs: before, during and after training."""
    import typer
    from rich.console import Console

    console = Console()

    @app.command()
    def init(
        task: Annotated[str, typer.Argument(help="What is to be learnt, as in classification.")],
        output: Annotated[Path, typer.Option(help="The file to write.")] = Path("run.yaml"),
    ) -> None:
        """Write a commented YAML file to start from."""
        from fastlora.train import starters

        starters.write(task, output, console)

    @app.command()
    def train(
        file: Annotated[Path, typer.Argument(help="A YAML file; fastlora init writes one.")],
        overrides: Annotated[list[str] | None, typer.Argument(help=_OVERRIDES)] = None,
    ) -> None:
        """Fine-tune a pre-trained model on a data file, and score it against the base.

        Run the same command again to go on with a run that was interrupted.
        """
        from fastlora.train import commands

        commands.train(file, overrides or [], console)

    @app.command()
    def compare(
        file: Annotated[Path, typer.Argument(help="A YAML file, as for train.")],
        overrides: Annotated[list[str] | None, typer.Argument(help=_OVERRIDES)] = None,
        methods: Annotated[
            str, typer.Option(help="Names of methods with commas between.")
        ] = "full,head,partial,adapter,lora,dora,loha,lokr,prefix,prompt",
        seeds: Annotated[str, typer.Option(help="Seeds with commas between.")] = "0",
    ) -> None:
        """Train with several methods over the same data and seeds, and recommend one."""
        from fastlora.train import commands

        commands.compare(file, methods, seeds, overrides or [], console)

    @app.command(name="eval")
    def evaluate(
        run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
        data: Annotated[str, typer.Argument(help="A data file, as data.test.")],
    ) -> None:
        """Score a run's model on other data."""
        from fastlora.train import finished

        finished.evaluate(run, data, console)

    @app.command()
    def predict(
        run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
        data: Annotated[str, typer.Argument(help="A data file; the answers' column may lack.")],
        output: Annotated[
            Path | None, typer.Option(help="A .jsonl file to write; default: print.")
        ] = None,
    ) -> None:
        """Write a run's answer for each row of a file."""
        from fastlora.train import finished

        finished.predict(run, data, output, console)

    @app.command()
    def merge(
        run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
        output: Annotated[
            Path | None, typer.Argument(help="The directory to write; default: RUN/merged.")
        ] = None,
    ) -> None:
        """Write a run's model as a plain checkpoint that transformers loads."""
        from fastlora.train import finished

        finished.merge(run, output or run / "merged", console)

    @app.command()
    def chat(
        run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    ) -> None:
        """Talk with a run's language model."""
        from fastlora.train import finished

        finished.chat(run, console)

    @app.command()
    def doctor() -> None:
        """Say what this machine can run, on which backend, and why not more."""
        from fastlora.train import doctor as report

        report.run(console)
