"""How much of what captions name a linear classifier reads from a teacher's text encoders.

    python benchmarks/text_probe.py [--teacher embedded-teacher] [--num-captions 6000]

A word that cannot be read off linearly is one that neither the UNet's attention nor the discriminator's projection will
heed. Prints, for each attribute, the share of named values told on the last sixth of the captions: from the end token's
hidden states that the UNet attends to, and from the pooled embedding that UNet and discriminator are conditioned on.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from onestroke.build import pipeline_of
from onestroke.data.comicset.dataset import ComicSource
from onestroke.data.comicset.vocabulary import judged_values
from onestroke.families.load import from_pipeline

FEWEST = 20  # captions to test an attribute on


def told(vectors: torch.Tensor, labels: torch.Tensor, test: torch.Tensor) -> float:
    """The share of test rows whose label logistic regression on the other rows tells."""
    rows = torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1)
    weights = torch.zeros(rows.shape[1], int(labels.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=60)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows[~test] @ weights, labels[~test]) + 1e-4 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return ((rows[test] @ weights).argmax(dim=1) == labels[test]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="embedded-teacher")
    parser.add_argument("--num-captions", type=int, default=6000)
    options = parser.parse_args()
    model = from_pipeline(pipeline_of(options.teacher))
    source = ComicSource(options.num_captions)
    captions = [source.described(index) for index in range(len(source))]
    hidden, pooled = [], []
    with torch.no_grad():
        for first in range(0, len(captions), 200):
            condition = model.encode_prompts([caption.text for caption in captions[first : first + 200]])
            hidden.append(condition.text[:, -1])
            pooled.append(condition.pooled)
    kinds = {"hidden states": torch.cat(hidden), "pooled": torch.cat(pooled)}
    kinds = {kind: (x - x.mean(0)) / (x.std(0) + 1e-5) for kind, x in kinds.items()}
    test = torch.arange(len(captions)) >= len(captions) * 5 // 6
    for name, values in judged_values().items():
        rows = torch.tensor([i for i, caption in enumerate(captions) if name in caption.named])
        if len(values) < 2 or test[rows].sum() < FEWEST:
            continue
        labels = torch.tensor([values.index(captions[i].named[name]) for i in rows.tolist()])
        shares = [f"{kind} {told(x[rows], labels, test[rows]):.3f}" for kind, x in kinds.items()]
        print(f"{name:14} {len(values):3} values  {'  '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
