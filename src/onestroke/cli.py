"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from onestroke.errors import OnestrokeError, RecipeError

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
NO_MEMORY = (  # what a GPU's allocator, its matrix products, a CPU's allocator and a fork say
    "out of memory", "cublas_status_alloc_failed", "can't allocate memory", "cannot allocate memory",
)  # fmt: skip
FOLDER_TROUBLE = {  # what a folder that is written to may say
    errno.ENOSPC: "Free disk space and run again; what was saved is whole",
    errno.EDQUOT: "Free disk space and run again; what was saved is whole",
    errno.EACCES: "Check its permissions or choose another folder",
    errno.EPERM: "Check its permissions or choose another folder",
    errno.EROFS: "Choose a folder that can be written to",
    errno.EEXIST: "A file has that name: choose another folder",
    errno.ENOTDIR: "A file has that name: choose another folder",
}
GATE_FAILED = 3  # exit status: measured, and not good enough; 1 is an error

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
def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a packaged name: mini, sdxl-anime, sd15.")],
    overrides: Set = None,
    device: Annotated[str | None, typer.Option(help="Such as h100-80gb; none: this machine, measured.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Devices that share each batch.")] = 1,
) -> None:
    """What a run will need, before anything is loaded: memory by part, step time, total time; and what to change."""
    from onestroke.commands.plan import run_plan

    run_plan(recipe, overrides or [], device, count, console=console)


@app.command("lora-extract")
def lora_extract(
    student: Annotated[str, typer.Argument(help="A distilled model: a folder, hub id or checkpoint.")],
    teacher: Annotated[str, typer.Argument(help="What it was distilled from.")],
    rank: Annotated[int, typer.Option(min=1, help="Numbers kept a layer: more is closer, and larger.")] = 64,
    out: Out = Path("lora"),
) -> None:
    """Write what a student learnt as a LoRA adapter for its teacher, for diffusers and in kohya's layout."""
    from onestroke.commands.lora import run_lora_extract

    run_lora_extract(student, teacher, out, rank=rank, console=console)


@app.command()
def generate(
    prompt: str,
    out: Out = Path("out.png"),
    model: Annotated[str, typer.Option(help='"embedded", "embedded-teacher", or a model folder or file.')] = "embedded",
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    guidance: Annotated[float, typer.Option(min=0.0, help="0 for a student; a teacher wants 2 to 8.")] = 0.0,
    count: Annotated[int, typer.Option(min=1, max=64, help="Pictures, of seeds from --seed on, side by side.")] = 1,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8; none: the model's own.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8; none: the model's own.")] = None,
) -> None:
    """Draw a picture from words."""
    from onestroke.commands.generate import run_generate

    run_generate(
        prompt, out, model, steps=steps, seed=seed, guidance=guidance, count=count, console=console, width=width,
        height=height,
    )  # fmt: skip


@app.command()
def pretrain(
    data: Annotated[
        str | None, typer.Option(help="Captioned pictures, as for distill; none: the embedded ones.")
    ] = None,
    size: Annotated[int, typer.Option(help="Pixels a side, a multiple of 16.")] = 128,
    start: Annotated[str | None, typer.Option(help="Go on from this teacher: embedded-teacher, or a folder.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    minutes: Minutes = None,
    out: Out = Path("runs/pretrain"),
) -> None:
    """Train a small teacher from nothing: the VAE, the judge (of the embedded pictures) and the UNet."""
    from onestroke.commands.pretrain import run_pretrain
    from onestroke.config import pretrain_recipe

    given = [f"size={size}", *([] if start is None else [f"start={json.dumps(start)}"]), *(overrides or [])]
    run_pretrain(data, pretrain_recipe(given), minutes, out, device=device, console=console)


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
    sources: Annotated[list[str], typer.Argument(help="Folders, .tar or .parquet files, addresses, datasets:NAME.")],
    out: Out,
    recipe: Annotated[Path | None, typer.Option(help="The stages and their thresholds, e.g. curate.yaml.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; none: one a core.")] = None,
    ray: Annotated[str | None, typer.Option(help='A Ray cluster, as HOST:PORT or "auto", or "local".')] = None,
) -> None:
    """Turn a heap of pictures into clean WebDataset shards, an index and a page that says what was dropped and why."""
    from onestroke.commands.curate import run_curate

    run_curate(sources, out, recipe, workers, ray=ray, console=console)


@app.command()
def encode(
    data: Annotated[str, typer.Argument(help="Captioned pictures: a folder, shards, an address, datasets:NAME.")],
    recipe: Annotated[str | None, typer.Option(help="The recipe that will be distilled by.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A diffusers folder, hub id or .safetensors checkpoint.")] = None,
    overrides: Set = None,
) -> None:
    """Encode a set once for all its distillations: latents with crops and flips, image and text embeddings."""
    from onestroke.commands.encode import run_encode

    run_encode(data, recipe, teacher, overrides or [], console=console)


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[str, typer.Argument(help="Captioned pictures: a folder, shards, an address, datasets:NAME.")],
    size: Annotated[int, typer.Option(min=8, max=8192, help="Pixels a side that will be trained on.")] = 512,
    buckets: Annotated[str, typer.Option(help="none, sdxl or computed, as data.buckets.")] = "none",
    num_buckets: Annotated[int, typer.Option(min=1, max=64, help="Computed ones, at most.")] = 12,
    batch_size: Annotated[int, typer.Option(min=1, help="A bucket that cannot fill a batch is dissolved.")] = 1,
    crop: Annotated[str, typer.Option(help="center or random.")] = "center",
    sample: Annotated[int, typer.Option(min=1, help="Pictures looked at, at most.")] = 1000,
    out: Out = Path("contact-sheet.png"),
) -> None:
    """What is in a set, and what a trainer will see after buckets and crops: numbers, and a contact sheet as a PNG."""
    from onestroke.commands.inspection import run_inspect

    run_inspect(
        folder, out, size=size, crop=crop, sample=sample, console=console, buckets=buckets, num_buckets=num_buckets,
        batch_size=batch_size,
    )  # fmt: skip


@app.command()
def evaluate(
    student: Annotated[str, typer.Argument(help='"embedded", or a student folder.')] = "embedded",
    teacher: Annotated[str | None, typer.Option(help="The model to replace; none: the one of its recipe.")] = None,
    data: Annotated[str | None, typer.Option(help='Held-out captioned pictures: a folder, or "comicset".')] = None,
    steps: Annotated[str, typer.Option(help="The student's numbers of steps.")] = "1,2,4",
    teacher_steps: Annotated[int, typer.Option(min=2)] = 50,
    prompts: Annotated[
        Path | None, typer.Option(help=".txt, .jsonl, .csv or .parquet; none: captions of DATA.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=2, help="Pictures of each set.")] = 1000,
    gate: Annotated[str, typer.Option(help='As in "fd_ratio@1<=1.1, adherence_drop@1<=0.02".')] = "",
    group_by: Annotated[list[str] | None, typer.Option(help="A column of the prompts; repeat for more.")] = None,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="The teacher's guidance scale.")] = None,
    size: Annotated[int | None, typer.Option(min=8, help="Pixels a side; none: the recipe's or the model's.")] = None,
    weights: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a feature network or scorer.")] = None,
    trained_against: Annotated[list[str] | None, typer.Option(help="A network the discriminator saw.")] = None,
    teacher_floor: Annotated[bool, typer.Option(help="Draw the teacher once more, with other seeds.")] = True,
    latency: Annotated[bool, typer.Option(help="Time student and teacher as well.")] = True,
    cache: Annotated[Path | None, typer.Option(help="Where pictures are kept; none: OUT/cache.")] = None,
    out: Out = Path("runs/evaluate"),
) -> None:
    """Measure a student against its teacher on held-out pictures; exits with 3 where the gate fails."""
    from onestroke.commands.evaluate import run_evaluate
    from onestroke.commands.evaluate_request import Request, parse_steps, parse_weights

    request = Request(
        student, teacher, data, out, parse_steps(steps), teacher_steps, prompts, num_images, gate, guidance, size,
        tuple(group_by) if group_by else None, parse_weights(weights or []), tuple(trained_against or ()),
        teacher_floor, latency, cache,
    )  # fmt: skip
    if not run_evaluate(request, console=console):
        raise typer.Exit(GATE_FAILED)


@app.command()
def arena(
    student: Annotated[str | None, typer.Argument(help='"embedded", or a model folder or file.')] = None,
    teacher: Annotated[str | None, typer.Argument(help='"embedded-teacher", or a model folder or file.')] = None,
    prompts: Annotated[Path | None, typer.Option(help="One a line; none: the embedded held-out prompts.")] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="The first so many; each becomes a pair.")] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="The student's.")] = 1,
    teacher_steps: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    guidance: Annotated[float | None, typer.Option(min=0.0, help="The teacher's guidance scale.")] = None,
    votes: Annotated[Path | None, typer.Option(help="The votes file; none: votes.jsonl in --out.")] = None,
    voter: Annotated[str, typer.Option(help="Whose votes these are.")] = "me",
    results: Annotated[Path | None, typer.Option(help="Print what this votes file says, and stop.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture, and of the order.")] = 0,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of this machine's own address; 0 takes a free one.")
    ] = 8760,
    out: Out = Path("runs/arena"),
) -> None:
    """Vote blind on pictures of a student and its teacher, in the browser; Elo and Bradley-Terry from the votes."""
    from onestroke.commands.arena import print_results, run_arena

    if results is not None:
        print_results(results, console)
        return
    if student is None or teacher is None:
        raise RecipeError(
            "two models are needed", where="arena", fix="As in `onestroke arena embedded embedded-teacher`."
        )
    run_arena(
        student,
        teacher,
        out,
        prompts=prompts,
        num_prompts=num_prompts,
        steps=steps,
        teacher_steps=teacher_steps,
        guidance=guidance,
        votes=votes,
        voter=voter,
        seed=seed,
        port=port,
        console=console,
    )


@app.command()
def ablate(
    recipe: Annotated[str, typer.Argument(help="A recipe (file or packaged name), or a study file with groups.")],
    over: Annotated[
        list[str] | None, typer.Option("--over", help="What to vary: section.key=value,value. May be repeated.")
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid/--one-at-a-time", help="All combinations of several --over, or one at a time.")
    ] = False,
    seeds: Annotated[str | None, typer.Option(help="Of every setting: 0,1,2. None: 0, or the study's.")] = None,
    num_images: Annotated[int | None, typer.Option(min=1, help="Pictures in every run; none: the recipe's.")] = None,
    count: Annotated[int | None, typer.Option(min=100, help="Pictures each student is measured on.")] = None,
    overrides: Set = None,
    minutes: Minutes = None,
    out: Out = Path("runs/ablate"),
) -> None:
    """Distil with equal budgets, varying the recipe; one table with intervals: ablation.html, .md and .json."""
    from onestroke.commands.ablate import command_line, run_ablate, study_of

    study = study_of(
        recipe,
        over or [],
        is_grid=grid,
        seeds=seeds,
        num_images=num_images,
        count=count,
        overrides=overrides or [],
    )
    options = {"--seeds": seeds, "--num-images": num_images, "--count": count}
    words = command_line(recipe, over or [], options, is_grid=grid, overrides=overrides or [])
    run_ablate(study, out, minutes=minutes, command=words, console=console)


Host = Annotated[str, typer.Option(help="The address to listen on; any but this machine's own needs a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")]
Token = Annotated[str | None, typer.Option(envvar="ONESTROKE_TOKEN", help="What clients must send as their API key.")]
Loras = Annotated[Path | None, typer.Option(help="A folder of LoRAs that requests, and the studio, may name.")]
Names = Annotated[list[str] | None, typer.Option("--allow-host", help="A name that the server may be called by.")]


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help='"embedded", or a model folder or file.')] = "embedded",
    teacher: Annotated[str | None, typer.Option(help="A second model, drawn in 25 guided steps.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8188,
    token: Token = None,
    allow_host: Names = None,
    wait_ms: Annotated[float, typer.Option(min=0.0, max=5.0, help="How long a request waits for company.")] = 5.0,
    max_batch: Annotated[int, typer.Option(min=1, max=256, help="Pictures drawn together.")] = 16,
    max_queue: Annotated[int, typer.Option(min=1, help="Pictures that wait before others are refused.")] = 128,
    also: Annotated[list[str] | None, typer.Option(help="A further model, as MODEL or NAME=MODEL.")] = None,
    memory_gb: Annotated[float | None, typer.Option(min=0.0, help="Weights of models that are loaded at once.")] = None,
    loras: Loras = None,
    rate: Annotated[float | None, typer.Option(min=1.0, help="Pictures a minute for one address.")] = None,
    safety: Annotated[str | None, typer.Option(help="An image classifier that looks at every picture.")] = None,
    safety_block: Annotated[list[str] | None, typer.Option(help="A label of it to withhold (nsfw).")] = None,
    safety_threshold: Annotated[float, typer.Option(min=0.0, max=1.0, help="From which probability on.")] = 0.5,
    replicas: Annotated[int | None, typer.Option(min=1, help="That many servers of it, by Ray Serve.")] = None,
    autoscale: Annotated[str | None, typer.Option(help="LOW:HIGH servers of it, by how much is asked.")] = None,
    ray: Annotated[str | None, typer.Option(help='Where they run: HOST:PORT, "auto", or "local", the default.')] = None,
) -> None:
    """Serve a model: OpenAI's image API, a WebSocket for live drawing, and Prometheus's figures."""
    from onestroke.commands.serve import Address, House, Offer, run_serve

    address = Address(host, port, tuple(allow_host or ()), token)
    blocked = tuple(safety_block or ("nsfw",))
    house = House(tuple(also or ()), memory_gb, loras, rate, safety, blocked, safety_threshold)
    offer = Offer(model, teacher, address, house, wait_ms, max_batch, max_queue)
    if ray is None and replicas is None and autoscale is None:
        run_serve(offer, console=console)
        return
    from onestroke.commands.replicas import Replicas, run_replicas

    run_replicas(offer, Replicas.of(replicas, autoscale, ray), console=console)


@app.command()
def studio(
    model: Annotated[str, typer.Argument(help='"embedded", or a model folder or file.')] = "embedded",
    teacher: Annotated[str | None, typer.Option(help="A model to compare with; the embedded one has its own.")] = None,
    host: Host = "127.0.0.1",
    port: Port = 8188,
    token: Token = None,
    allow_host: Names = None,
    loras: Loras = None,
) -> None:
    """Open the studio: a comic page in the browser whose panels redraw while you type."""
    from onestroke.commands.serve import Address, House, Offer, run_serve

    address = Address(host, port, tuple(allow_host or ()), token)
    teacher = "embedded-teacher" if teacher is None and model == "embedded" else teacher
    run_serve(Offer(model, teacher, address, House(loras=loras), wait_ms=2.0, with_page=True), console=console)


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


@bench.command("loader")
def bench_loader(
    data: Annotated[
        str | None, typer.Argument(help="What training would read; none: comic pictures in shards.")
    ] = None,
    size: Annotated[int, typer.Option(min=8, help="Pixels a side that they are cut to.")] = 128,
    source_size: Annotated[int, typer.Option(min=8, help="Pixels a side of the comic pictures.")] = 256,
    images: Annotated[int, typer.Option(min=16, help="Pictures to read.")] = 1000,
) -> None:
    """Pictures a second that the trainer's loader reads, decodes and cuts on one core."""
    from onestroke.commands.bench_loader import run_loader

    run_loader(data, size, source_size, images, console)


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
        sys.exit(app(standalone_mode=False) or 0)  # the status of typer.Exit comes back as the value
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
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY):
            print(
                "onestroke: the device has no room. Lower train.micro_batch_size or data.size, or set "
                "student.gradient_checkpointing=true.",
                file=sys.stderr,
            )
            sys.exit(1)
        if isinstance(error, OSError) and error.errno in FOLDER_TROUBLE:
            where = f"{error.filename}: " if error.filename else ""
            print(f"onestroke: {where}{error.strerror}. {FOLDER_TROUBLE[error.errno]}.", file=sys.stderr)
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
