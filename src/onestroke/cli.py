"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onestroke.errors import OnestrokeError

app = typer.Typer(
    help="Distil a text-to-image model into one that draws in 1 to 4 steps; measure it; draw with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Timings, each a command.", no_args_is_help=True)
app.add_typer(bench, name="bench")
data_app = typer.Typer(help="Look at a set of pictures.", no_args_is_help=True)
app.add_typer(data_app, name="data")
console = Console()

Out = Annotated[Path, typer.Option("--out", "-o", help="Where the result goes.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a recipe key: section.key=value.")]
Minutes = Annotated[float | None, typer.Option(min=0.0, help="Stop after so many minutes; run again to continue.")]


@app.command()
def demo(
    minutes: Annotated[float, typer.Option(min=0.1, help="Minutes of training.")] = 10.0,
    out: Out = Path("runs/demo"),
    seed: int = 0,
) -> None:
    """Distil the embedded teacher on the embedded comic pictures, and report how good the student is."""
    from onestroke.commands.demo import run_demo

    run_demo(out, minutes=minutes, seed=seed, console=console)


@app.command()
def distill(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe file, or a packaged name: mini, sdxl-anime, sd15.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="A diffusers folder, hub id or .safetensors checkpoint.")] = None,
    student: Annotated[str | None, typer.Option(help="Continue this student: a diffusers folder.")] = None,
    data: Annotated[str | None, typer.Option(help="A folder of captioned pictures.")] = None,
    overrides: Set = None,
    minutes: Minutes = None,
    out: Out = Path("runs/distill"),
) -> None:
    """Distil a teacher into a 1-to-4-step student by Adversarial Diffusion Distillation."""
    from onestroke.commands.distill import run_distill

    run_distill(recipe, teacher, student, data, overrides or [], minutes, out, console=console)


@app.command()
def generate(
    prompt: str,
    out: Out = Path("out.png"),
    model: Annotated[str, typer.Option(help='"embedded", "embedded-teacher", or a model folder or file.')] = "embedded",
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    guidance: Annotated[float, typer.Option(min=0.0, help="0 for a student; a teacher wants 2 to 8.")] = 0.0,
    count: Annotated[int, typer.Option(min=1, max=64, help="Pictures, of seeds from --seed on, side by side.")] = 1,
) -> None:
    """Draw a picture from words."""
    from onestroke.commands.generate import run_generate

    run_generate(prompt, out, model, steps=steps, seed=seed, guidance=guidance, count=count, console=console)


@app.command()
def pretrain(
    data: Annotated[Path | None, typer.Option(help="A folder of captioned pictures; none: the embedded ones.")] = None,
    size: Annotated[int, typer.Option(min=32, max=1024, help="Pixels a side, a multiple of 16.")] = 128,
    vae_images: Annotated[int, typer.Option(min=1)] = 84_000,
    judge_images: Annotated[int, typer.Option(min=1)] = 110_000,
    teacher_images: Annotated[int, typer.Option(min=1)] = 200_000,
    start: Annotated[str | None, typer.Option(help="A teacher to go on from, by this command.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    minutes: Minutes = None,
    out: Out = Path("runs/pretrain"),
) -> None:
    """Train a small teacher from nothing: the VAE, the judge (of the embedded pictures) and the UNet."""
    from onestroke.commands.pretrain import run_pretrain

    images = (vae_images, judge_images, teacher_images)
    run_pretrain(data, size, *images, start, minutes, out, device=device, console=console)


@app.command()
def comicset(
    count: Annotated[int, typer.Option(min=1, help="Pictures.")],
    out: Out,
    split: str = "train",
    size: Annotated[int, typer.Option(min=1, max=4096, help="Pixels a side.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    layout: Annotated[str, typer.Option(help="imagefolder or webdataset.")] = "imagefolder",
) -> None:
    """Write the embedded comic pictures and captions."""
    from rich.progress import Progress

    from onestroke.data.comicset.dataset import write_comicset

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("comicset", total=count)
        folder = write_comicset(
            out,
            count=count,
            split=split,
            size=size,
            seed=seed,
            layout=layout,
            on_progress=lambda done, total: progress.update(task, completed=done),
        )
    console.print(f"{count} pictures of the {split} split in {folder}")


@app.command()
def curate(
    sources: Annotated[list[str], typer.Argument(help="Folders of pictures or shards, .tar and .parquet files.")],
    out: Out,
    recipe: Annotated[Path | None, typer.Option(help="The stages and their thresholds, e.g. curate.yaml.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; none: one a core.")] = None,
) -> None:
    """Turn a heap of pictures into clean WebDataset shards, an index and a page that says what was dropped and why."""
    from onestroke.commands.curate import run_curate

    run_curate(sources, out, recipe, workers, console=console)


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of captioned pictures or shards.")],
    size: Annotated[int, typer.Option(min=8, max=8192, help="Pixels a side that will be trained on.")] = 512,
    crop: Annotated[str, typer.Option(help="center or random.")] = "center",
    sample: Annotated[int, typer.Option(min=1, help="Pictures looked at, at most.")] = 1000,
    out: Out = Path("contact-sheet.png"),
) -> None:
    """What is in a set, and what a trainer will see of it after crops: numbers, and a contact sheet as a PNG."""
    from onestroke.commands.inspection import run_inspect

    run_inspect(folder, out, size=size, crop=crop, sample=sample, console=console)


@app.command()
def report(
    student: Annotated[str, typer.Argument(help='"embedded", or a student folder.')] = "embedded",
    teacher: str = "embedded-teacher",
    num_images: Annotated[int, typer.Option(min=100, help="Pictures of each set.")] = 1000,
    guidance: Annotated[float | None, typer.Option(help="The teacher's guidance scale.")] = None,
    latency: Annotated[bool, typer.Option(help="Time student and teacher as well.")] = True,
    out: Out = Path("runs/report"),
) -> None:
    """Measure a student of the embedded kind against its teacher on held-out pictures: report.html and report.json."""
    from onestroke.commands.report import run_report

    run_report(student, teacher, out, num_images=num_images, guidance=guidance, with_latency=latency, console=console)


@app.command()
def doctor() -> None:
    """What is installed, what works on this machine, what is missing and how to get it."""
    from onestroke.commands.doctor import run_doctor

    run_doctor(console)


@bench.command("train-step")
def bench_train_step(
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    rounds: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """The ADD step beside its unavoidable parts, each measured alone in the same run."""
    from onestroke.commands.bench import run_train_step

    run_train_step(batch_size, rounds, console)


@bench.command("inference")
def bench_inference(rounds: Annotated[int, typer.Option(min=1)] = 5) -> None:
    """The embedded student at 1 step beside the guided 50-step teacher, end to end and by part."""
    from onestroke.commands.bench import run_inference

    run_inference(rounds, console)


def main() -> None:
    """The `onestroke` command; what the user can mend prints as one line and exits with 1."""
    from onestroke.commands.quiet import quiet

    quiet()
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except OnestrokeError as error:
        print(f"onestroke: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        print("onestroke: stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        import click

        if isinstance(error, click.ClickException):
            error.show()
            sys.exit(error.exit_code)
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            print(
                "onestroke: the device has no room. Lower train.micro_batch_size or data.size, or set "
                "student.gradient_checkpointing=true.",
                file=sys.stderr,
            )
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
