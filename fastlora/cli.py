"""The `fastlora` command: `fastlora quickstart --help`."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

if TYPE_CHECKING:
    import typer

_NEEDED = ("typer", "rich", "transformers", "accelerate")


def main() -> None:
    """Run the command line.

    Bad input is one sentence on standard error and exit status 2.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        _refuse(f'{", ".join(missing)} not installed; run: pip install "fastlora[train]"')
    _app()()


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

        try:
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
        except job.Refusal as refusal:
            _refuse(str(refusal))

    @app.command()
    def tune(
        show: Annotated[bool, typer.Option("--show", help="Say what is stored.")] = False,
    ) -> None:
        """Measure which kernels are fastest on this GPU, and use them from now on."""
        from fastlora.train import tuning

        try:
            tuning.run(show)
        except tuning.Refusal as refusal:
            _refuse(str(refusal))

    return app
