# %% [markdown]
# # onestroke from Python, in five cells
# Everything here runs on a laptop-class machine, with nothing to download.
# Run it with `python examples/walkthrough.py`, or cell by cell in an editor that knows `# %%`.

# %%
import os
from pathlib import Path

import onestroke

out = Path(os.environ.get("ONESTROKE_EXAMPLE_OUT", "runs/walkthrough"))
num_images = int(os.environ.get("ONESTROKE_EXAMPLE_IMAGES", "1600"))  # pictures of training: about 3 minutes

# %% [markdown]
# ## Draw
# `load()` gives the shipped student, an ordinary diffusers pipeline. One step, no guidance.

# %%
student = onestroke.load()
out.mkdir(parents=True, exist_ok=True)
picture = student("a laughing person with pink hair and round glasses", num_inference_steps=1, guidance_scale=0.0)
picture.images[0].save(out / "one-step.png")

# %% [markdown]
# The teacher, for comparison: 50 steps under classifier-free guidance.

# %%
teacher = onestroke.load("embedded-teacher")
slow = teacher("a laughing person with pink hair and round glasses", num_inference_steps=50, guidance_scale=2.0)
slow.images[0].save(out / "fifty-steps.png")

# %% [markdown]
# ## Pictures and captions
# The comic set is deterministic by index: the same thousand pictures on every machine.

# %%
folder = onestroke.comicset(out / "pictures", count=64)
print((folder / "metadata.jsonl").read_text("utf-8").splitlines()[0])

# %% [markdown]
# ## Distil
# The packaged recipe `mini`, cut short. Stop it whenever you like: the same call goes on where it stopped.

# %%
seen = []
student_folder = onestroke.distill(
    "mini",
    out / "student-run",
    overrides=[f"train.num_images={num_images}", f"data.source={folder}", "train.sample_images=0"],
    observe=lambda progress, seconds_left: seen.append(progress.terms["student/distillation"]),
)
print(f"{len(seen)} steps, distillation loss {seen[0]:.4f} -> {seen[-1]:.4f}")

# %% [markdown]
# ## Use what came out
# A plain diffusers folder: any program that reads SDXL-Turbo reads it.

# %%
from diffusers import AutoPipelineForText2Image  # noqa: E402

mine = AutoPipelineForText2Image.from_pretrained(student_folder)
mine.set_progress_bar_config(disable=True)
mine("a person with a green mohawk", num_inference_steps=4, guidance_scale=0.0).images[0].save(out / "mine.png")
