"""The judge: a small network that names the attributes of a comic picture, trained on comicset alone.

It measures prompt adherence, and its features carry the Fréchet and kernel distances. No discriminator sees it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from onestroke.data.comicset.character import Character
from onestroke.data.comicset.vocabulary import judged_values, load_style

NOTHING = "nothing"  # the value of an attribute that the picture does not have
IGNORED = -1  # the label of an attribute that is hidden
WIDTHS = (32, 56, 80, 104)  # the small marks of a face are told apart early: mouths are 15 pixels wide
FEATURE_WIDTH = 128


def _conv(before: int, width: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Judge(nn.Module):
    """Pictures to one distribution per attribute, over its values and `NOTHING`."""

    def __init__(self, values: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.values = {name: (NOTHING, *names) for name, names in values.items()}
        layers: list[nn.Module] = [_conv(3, WIDTHS[0], stride=2), nn.ReLU()]  # 128 -> 64
        for before, width in pairwise(WIDTHS):
            layers += [_conv(before, width, stride=2), nn.ReLU(), _Block(width)]
        self.trunk = nn.Sequential(*layers, _Block(WIDTHS[-1]))
        self.project = nn.Linear(2 * WIDTHS[-1], FEATURE_WIDTH)
        self.heads = nn.Linear(FEATURE_WIDTH, sum(map(len, self.values.values())))

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 128"]:
        """What distances are measured on; images in [-1, 1], 128 px."""
        maps = self.trunk(images)  # b d 8 8
        return self.project(torch.cat([maps.mean(dim=(2, 3)), maps.amax(dim=(2, 3))], dim=1)).float()

    def logits(self, features: Float[Tensor, "b 128"]) -> dict[str, Tensor]:
        """Per attribute, b v: unnormalised log-probabilities over `values[attribute]`."""
        sizes = [len(names) for names in self.values.values()]
        parts = self.heads(F.relu(features)).float().split(sizes, dim=1)
        return dict(zip(self.values, parts, strict=True))

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        return self.logits(self.features(images))

    def name_values(self, features: Float[Tensor, "b 128"]) -> list[dict[str, str]]:
        """The likeliest value of every attribute, for each picture."""
        best = {name: logits.argmax(dim=1).tolist() for name, logits in self.logits(features).items()}
        return [{name: self.values[name][picks[i]] for name, picks in best.items()} for i in range(len(features))]


def labels_of(character: Character, values: Mapping[str, Sequence[str]]) -> list[int]:
    """The index of each attribute's value, 0 for nothing, `IGNORED` for what the style has but this picture hides."""
    style = load_style(character.style)
    known = {"style": character.style, **character.values}
    drawn_but_hidden = _hidden(character)
    labels = []
    for name, names in values.items():
        if name in known:
            labels.append(names.index(known[name]))
        elif name in drawn_but_hidden and any(a.name == name for a in style.attributes):
            labels.append(IGNORED)
        else:
            labels.append(0)
    return labels


def _hidden(character: Character) -> set[str]:
    style = load_style(character.style)
    return {name for fact in character.values.items() for name in style.hides.get(fact, ())}


def judge_loss(judge: Judge, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over attributes; `labels` b a, `IGNORED` where an attribute is hidden."""
    losses = [
        F.cross_entropy(logits, labels[:, i], ignore_index=IGNORED, reduction="sum") / len(labels)
        for i, logits in enumerate(judge(images).values())
    ]
    return torch.stack(losses).mean()


def new_judge() -> Judge:
    """An untrained judge of the comicset vocabulary."""
    torch.manual_seed(0)
    return Judge(judged_values())


@torch.no_grad()
def settle_norms(judge: Judge, batches: Iterable[Tensor]) -> None:
    """Measure the batch norms' statistics anew: averaged weights do not go with those of the last ones."""
    norms = [module for module in judge.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    judge.train()
    for images in batches:
        judge(images)
    judge.eval()


def save_judge(judge: Judge, path: Path) -> None:
    """Weights in float16 with the vocabulary in the file's metadata."""
    values = {name: names[1:] for name, names in judge.values.items()}
    halved = {k: v.half() if v.is_floating_point() else v for k, v in judge.state_dict().items()}
    state = {k: v.contiguous() for k, v in halved.items()}
    save_file(state, path, metadata={"values": json.dumps(values)})


def load_judge(path: Path) -> Judge:
    """A judge in float32, frozen."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        judge = Judge(json.loads(file.metadata()["values"]))
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return judge.requires_grad_(False).eval().to(memory_format=torch.channels_last)
