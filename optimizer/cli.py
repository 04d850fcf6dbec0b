"""The command `optimize`: each verb is the Python function of the same name.

Importing this file imports neither torch nor any runtime, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from . import cli_options as shared
from .errors import Error, RecipeError, nearest

if TYPE_CHECKING:
    from .progress import Reporter
    from .recipe import Recipe

SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".bin", ".pt2")
INTERRUPTED = 130
_PATH = click.Path(path_type=Path)


class _Verbs(click.Group):
    """A group whose first argument may also be a checkpoint: `optimize CHECKPOINT --entry ...` is `run`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        first = args[0]
        if first in self.commands or first.startswith("-"):
            return super().resolve_command(ctx, args)
        if first == "CHECKPOINT":
            return first, _checkpoint, args[1:]
        if first.endswith((".yaml", ".yml")):
            raise RecipeError(f'"{first}" is a recipe, not a checkpoint', fix=f"write optimize run {first}")
        if first.endswith(SUFFIXES) or Path(first).exists():
            return "CHECKPOINT", _checkpoint, args
        raise RecipeError(f'there is no command "{first}"', fix=nearest(first, self.commands))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="paredown")
def cli() -> None:
    """Make a trained network smaller and faster, prove that it still computes the same, and measure it.

    \b
    optimize run RECIPE               the whole pipeline, into one folder
    optimize CHECKPOINT --entry ...   the same with the shipped default recipe
    optimize demo                     see it work on a small trained network
    """


@cli.command()
@click.argument("recipe", type=_PATH)
@click.option("--plan", "plan_file", type=_PATH, help="Replay the decisions of a plan.yaml.")
@shared.out
def run(recipe: Path, plan_file: Path | None, **options: Any) -> None:
    """Compress, export, verify, measure and report, as RECIPE says."""
    from . import recipe as recipes

    settings = _settings(options)
    _run(recipes.read(recipe, settings), options | {"plan": plan_file, "default_out": recipe.stem})


@click.command(name="CHECKPOINT")
@click.argument("checkpoint", type=_PATH)
@click.option("--entry", help='What builds the network: "path.py:function"; a Hugging Face folder needs none.')
@click.option("--data", "data_entry", required=True, help="What gives calibration batches, in the same form.")
@click.option("--metric", help="What scores a model (higher is better), in the same form.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=SHAPE", help="As in x=batch,3,32,32 or ids=batch,seq:int64."
)
@click.option("--samples", type=click.IntRange(min=2), default=512, show_default=True, help="Calibration samples.")
@click.option("--plan", "plan_file", type=_PATH, help="Replay the decisions of a plan.yaml.")
@shared.out
def _checkpoint(checkpoint: Path, plan_file: Path | None, **options: Any) -> None:
    """Run the shipped default recipe (4-bit codebooks, ONNX, benchmark) on a checkpoint."""
    from . import quickstart

    request = quickstart.Request(
        checkpoint=checkpoint,
        entry=options["entry"] or "",
        data=options["data_entry"],
        metric=options["metric"] or "",
        inputs=tuple(options["inputs"]),
        samples=options["samples"],
    )
    recipe = quickstart.recipe(request, _settings(options))
    _run(recipe, options | {"plan": plan_file, "default_out": f"{checkpoint.stem}-optimized"})


@cli.command()
@click.argument("recipe", type=_PATH)
@click.option("--explain", is_flag=True, help="Say for each layer what it costs and why it is so.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe.")
def plan(recipe: Path, explain: bool, settings: tuple[str, ...]) -> None:
    """Print what would happen to each layer, as the plan.yaml that `run --plan` replays."""
    from . import planning
    from . import recipe as recipes

    job = planning.load(recipes.read(recipe, settings))
    planned = planning.plan(job)
    click.echo(recipes.dump_data(planning.plan_data(planned)), nl=False)
    if explain:
        click.echo(planning.explain(job, planned))


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--target", default="onnx", show_default=True, help="What to lower to: onnx, tensorrt or triton.")
@click.option("--out", type=_PATH, help="File to write.  [default: in the folder]")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@shared.graph
@shared.engine
@shared.served
def export(folder: Path, target: str, out: Path | None, force: bool, **options: Any) -> None:
    """Lower the model of an output folder."""
    from . import targets

    path = targets.export(folder, target, out, force=force, settings=targets.lowering_settings(target, options))
    for line in targets.explain(path, target):
        click.echo(line)
    click.echo(path)


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--target", required=True, help="The board: jetson-orin, jetson-thor or server.")
@click.option("--out", type=_PATH, help="Folder to make.  [default: the folder's name and the board's]")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@shared.graph
def bundle(folder: Path, target: str, out: Path | None, force: bool, **options: Any) -> None:
    """Make a folder that a board builds its TensorRT engine from."""
    from ..exporters import bundle as bundles
    from . import targets

    chosen = bundles.Options(**targets.lowering_settings("tensorrt", options))
    click.echo(bundles.bundle(folder, target, out, chosen, force=force))


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--runtime", default="onnxruntime", show_default=True, help="Where to run it: onnxruntime or tensorrt.")
@click.option("--no-kernels", is_flag=True, help="Run the portable bodies of packed layers.")
def verify(folder: Path, runtime: str, no_kernels: bool) -> None:
    """Compare the exported artifact of a folder with the stored model, output by output."""
    from . import targets

    for line in targets.verify(folder, runtime, kernels=not no_kernels):
        click.echo(line)


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is all of them.")
@click.option("--port", default=8000, show_default=True, help="Port to listen on; 0 is any that is free.")
@click.option("--threads", type=click.IntRange(min=0), default=1, show_default=True, help="Of each worker.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Executions at a time.")
@click.option("--max-batch", type=click.IntRange(min=1), help="Samples of an execution.  [default: 8, or 1]")
@click.option("--max-delay-ms", type=float, default=1.0, show_default=True, help="How long a request waits for others.")
@click.option("--capacity", type=click.IntRange(min=1), default=256, show_default=True, help="Requests that may wait.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a named dimension to warm up with.")
@click.option("--no-kernels", is_flag=True, help="Run the portable bodies of packed layers.")
def serve(folder: Path, no_kernels: bool, dims: tuple[str, ...], **options: Any) -> None:
    """Answer requests for the exported file of a folder, by the open inference protocol."""
    from ..bench import command
    from ..bench import serve as server

    server.run(folder, server.Spec(kernels=not no_kernels, dims=command.sizes(dims), **options), click.echo)


@cli.command()
@click.argument("artifacts", nargs=-1, required=True, type=_PATH)
@click.option(
    "--scenario",
    default="edge",
    show_default=True,
    help="How requests arrive: edge, singlestream, multistream, server, offline, stages, or several with commas.",
)
@click.option("--batch", default="1", show_default=True, help="Batch sizes, as in 1,32.")
@click.option("--threads", default="1", show_default=True, help="Thread counts, as in 1,2.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Size of a named dimension.")
@click.option("--min-seconds", type=float, help="Least measuring time of each.  [default: 3; LoadGen: 60]")
@click.option("--processes", type=int, help="Least number of fresh processes.  [default: 8]")
@click.option("--meter", help="Energy: auto, none, nvml, ina3221, tegrastats, rapl, or a module.  [default: auto]")
@click.option("--frame-ms", type=float, help="Duration of a frame, for real-time factors.")
@click.option("--state", multiple=True, metavar="OUTPUT=INPUT", help="Feed an output back in the next frame.")
@click.option("--input", "inputs", multiple=True, metavar="NAME=VALUE", help="Fill an input with a value.")
@shared.load
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the inputs.")
@click.option("--no-kernels", is_flag=True, help="Run the portable bodies of packed layers.")
@click.option("--device", default="", metavar="ssh://USER@HOST", help="A board that measures, reached by ssh.")
@click.option(
    "--baseline", "baselines", multiple=True, metavar="NAME", help="fp16, int8, matmulnbits or trtexec of the first."
)
@click.option("--out", type=_PATH, help="Folder for bench.json, bench.csv, bench.html.")
def bench(artifacts: tuple[Path, ...], **options: Any) -> None:
    """Time artifacts against the first of them, in turn, in several fresh processes."""
    out = options["out"]
    if out is not None and (out.is_file() or not out.parent.is_dir()):
        what = f'"{out}" is a file' if out.is_file() else f'the folder "{out.parent}" does not exist'
        raise RecipeError(what, where="--out", fix="name a folder to write")
    from ..bench import command

    names = ("scenario", "batch", "threads", "dims", "seed", "no_kernels", "out", "device", "baselines")
    common = {name: options.pop(name) for name in names}
    settings = {name: value for name, value in options.items() if value not in (None, ())}
    command.run(command.Request(artifacts=artifacts, settings=settings, **common), _reporter())


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--history", is_flag=True, help="Print what every run into this folder measured.")
def show(folder: Path, history: bool) -> None:
    """Print the report of a folder."""
    from rich.console import Console

    from . import report

    if history:
        report.show_history(folder, Console())
    else:
        report.show(report.read(folder), Console())


@cli.command()
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option("--across-machines", is_flag=True, help="Compare sizes and accuracy though machines or versions differ.")
def diff(first: Path, second: Path, across_machines: bool) -> None:
    """Print two reports, or two benchmarks, side by side and mark what differs."""
    from rich.console import Console

    from . import report

    report.diff(first, second, Console(), across_machines=across_machines)


@cli.command()
@click.option("--out", type=_PATH, default=Path("paredown-demo"), show_default=True, help="Folder to make.")
def demo(out: Path) -> None:
    """Compress a small network trained on handwritten digits; takes about a minute."""
    from . import recipe as recipes

    path = Path(__file__).parent / "recipes" / "demo.yaml"
    options = {"out": out, "force": out.name.startswith("paredown-demo"), "default_out": "paredown-demo"}
    _run(recipes.read(path), options)


@cli.command()
def doctor() -> None:
    """Say what this machine has, what works on it, and how to mend what does not."""
    from ..exporters.onnx_session import session_options
    from ..exporters.tensorrt_library import examine
    from . import doctor as doctors

    for line in (*doctors.examine(lambda library: session_options(library=library)), *examine()):
        click.echo(line)


def main() -> None:
    """Run the command; exit codes are those of `errors`, 130 when interrupted. An error is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a report is worth printing in any locale
    try:
        status = cli.main(prog_name="optimize", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(RecipeError.exit_code)
    except click.ClickException as error:
        _fail(_usage(error), RecipeError.exit_code)
    except Error as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        first = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        _fail("; ".join(part for part in ("interrupted", str(first)) if part), INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _fail(text: str, code: int) -> NoReturn:
    click.echo("optimize: " + " ".join(text.split()), err=True)
    sys.exit(code)


def _usage(error: click.ClickException) -> str:
    """Return what was wrong with the command line, and where its help is."""
    context = getattr(error, "ctx", None)
    text = error.format_message().rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; see {context.command_path if context else 'optimize'} --help"


def _settings(options: dict[str, Any]) -> tuple[str, ...]:
    seed = options.get("seed")
    return (*options["settings"], *(() if seed is None else (f"seed={seed}",)))


def _run(recipe: Recipe, options: dict[str, Any]) -> None:
    from . import run as runs

    command = shlex.join(["optimize", *sys.argv[1:]])
    chosen = runs.Options(
        out=options.get("out") or Path(options["default_out"]),
        plan=options.get("plan"),
        resume=bool(options.get("resume")),
        force=bool(options.get("force")),
        strict=bool(options.get("strict")),
        command=command,
    )
    if options.get("dry_run"):
        click.echo(runs.dry_run(recipe, chosen))
        return
    full = runs.run(recipe, chosen, _reporter())
    _tell(full, chosen.out)


def _tell(full: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from . import report

    report.show(full, Console())
    click.echo(f"report: {os.path.join(out, 'report.html')}")


def _reporter() -> Reporter:
    from rich.console import Console

    from .progress import Reporter

    return Reporter(console=Console(stderr=True))


if __name__ == "__main__":
    main()
