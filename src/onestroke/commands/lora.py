"""`onestroke lora-extract`: what a student learnt, as an adapter that loads on its teacher."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from onestroke.build import pipeline_of
from onestroke.commands.machine import use_machine
from onestroke.commands.quiet import quiet_libraries
from onestroke.families.load import from_pipeline
from onestroke.lora import extract_lora, num_parameters, save_lora


def run_lora_extract(student: str, teacher: str, out: Path, *, rank: int, console: Console) -> None:
    """Write `out/pytorch_lora_weights.safetensors` and `out/kohya.safetensors`, and say how much they hold."""
    quiet_libraries()
    use_machine()
    ours, theirs = (from_pipeline(pipeline_of(name), source=name) for name in (student, teacher))
    found = extract_lora(ours.unet, theirs.unet, rank=rank)
    is_sdxl = theirs.family.name == "sdxl"
    files = [
        save_lora(found.factors, out / "pytorch_lora_weights.safetensors", ours.unet, is_sdxl=is_sdxl),
        save_lora(found.factors, out / "kohya.safetensors", ours.unet, layout="kohya", is_sdxl=is_sdxl),
    ]
    for line in (
        f"{num_parameters(found.factors.values()):,} numbers in {len(found.factors)} layers, rank {rank}",
        f"they hold {found.held:.1%} of the squared difference of these layers' weights; "
        f"{found.outside:.1%} of all difference lies in weights that no adapter holds",
        *(str(file) for file in files),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
