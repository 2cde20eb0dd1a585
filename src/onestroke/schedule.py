"""The noise schedule of a diffusion model: rates, noising, and what a network's output says about `x0`.

`alpha_t = sqrt(alphas_cumprod[t])`, `sigma_t = sqrt(1 - alphas_cumprod[t])`, `x_t = alpha_t x0 + sigma_t eps`
(DDPM, arXiv 2006.11239, eq. 4; v-prediction: arXiv 2202.00512, eq. 12 and appendix D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from onestroke.errors import ModelError
from onestroke.types import PredictionType

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")


def student_timesteps(num_steps: int, *, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The timesteps that a student draws at, noisiest first: diffusers' `timestep_spacing="trailing"`.

    4 steps of 1000: 999, 749, 499, 249. They never include 0, and the first is always the last training timestep.
    Computed as diffusers does: halves (48 steps) would else round to another neighbour.
    """
    steps = np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps).round() - 1
    return tuple(int(step) for step in steps[:num_steps])


def beta_settings(config: Mapping) -> dict:
    """What another sampler takes of a teacher's scheduler config: the betas, and nothing of its sampling.

    They are rescaled where `NoiseSchedule` rescales them: as the config says, but never for a teacher that predicts
    epsilon, whose x0 would be multiplied by 4096.
    """
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    settings = {key: config[key] for key in keys if config.get(key) is not None}
    is_epsilon = config.get("prediction_type", "epsilon") == "epsilon"
    return settings | {"rescale_betas_zero_snr": bool(config.get("rescale_betas_zero_snr")) and not is_epsilon}


@dataclass(frozen=True)
class NoiseSchedule:
    """`alphas_cumprod`: float64, one per training timestep, falling; 0 at the end with zero terminal SNR."""

    alphas_cumprod: Float[Tensor, " t"]

    @classmethod
    def from_config(cls, config: Mapping, *, prediction_type: PredictionType | None = None) -> NoiseSchedule:
        """The schedule that a diffusers scheduler config describes.

        With epsilon-prediction a `rescale_betas_zero_snr` in the config is not applied: `x0` would be divided by an
        alpha of (nearly) 0. The original rates read `x0`, and the last timestep is fed pure noise all the same.
        """
        kind = prediction_type or config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise ModelError(
                f"prediction type {kind!r} is not supported", fix=f"Use one of {', '.join(PREDICTION_TYPES)}."
            )
        alphas_cumprod = torch.cumprod(1 - _betas(config), 0)
        if config.get("rescale_betas_zero_snr") and kind != "epsilon":
            alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
        return cls(alphas_cumprod)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def ends_in_pure_noise(self) -> bool:
        """Zero terminal SNR: at the last timestep `x_t` holds no signal, and no noise prediction tells `x0`."""
        return self.alphas_cumprod[-1].item() == 0

    def rates(self, t: Int[Tensor, " b"], like: Tensor) -> tuple[Tensor, Tensor]:
        """`alpha_t` and `sigma_t`, shaped b 1 1 1, in the dtype (float32 at least) and device of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        alpha_bar = rearrange(self.alphas_cumprod[t.cpu()], "b -> b 1 1 1").to(like.device)
        return alpha_bar.sqrt().to(dtype), (1 - alpha_bar).sqrt().to(dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Int[Tensor, " b"]) -> Tensor:
        """`x_t = alpha_t x0 + sigma_t eps`."""
        alpha, sigma = self.rates(t, x0)
        return alpha * x0 + sigma * eps

    def student_input(self, x0: Tensor, eps: Tensor, t: Int[Tensor, " b"]) -> Tensor:
        """`add_noise`, but at the last timestep no signal at all: `sigma_T eps` (ADD, arXiv 2311.17042, section 3.1).

        The paper feeds `eps`; the factor sigma_T (0.9977 for SDXL, 1 with zero terminal SNR) is what the exported
        Euler scheduler feeds at its first step, so training and drawing agree.
        """
        is_last = rearrange(t == len(self) - 1, "b -> b 1 1 1").to(x0.device)
        return self.add_noise(torch.where(is_last, torch.zeros_like(x0), x0), eps, t)

    def to_x0(self, output: Tensor, x_t: Tensor, t: Int[Tensor, " b"], kind: PredictionType) -> Tensor:
        """Read a network's output as a prediction of `x0`, in float32 at least."""
        alpha, sigma = self.rates(t, x_t)
        output = exact(output)
        if kind == "epsilon":
            return (x_t - sigma * output) / alpha
        if kind == "v_prediction":
            return alpha * x_t - sigma * output
        return output

    def from_x0(self, x0: Tensor, x_t: Tensor, t: Int[Tensor, " b"], kind: PredictionType) -> Tensor:
        """The output a network would give for the prediction `x0`: `to_x0` the other way round (sigma_t > 0)."""
        alpha, sigma = self.rates(t, x_t)
        if kind == "epsilon":
            return (x_t - alpha * x0) / sigma
        if kind == "v_prediction":
            return (alpha * x_t - x0) / sigma
        return x0

    def target(self, x0: Tensor, eps: Tensor, t: Int[Tensor, " b"], kind: PredictionType) -> Tensor:
        """What a network that predicts `kind` is trained to output."""
        alpha, sigma = self.rates(t, x0)
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]


def exact(x: Tensor) -> Tensor:
    """`x` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _betas(config: Mapping) -> Tensor:
    count = config.get("num_train_timesteps", 1000)
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float64)
    shape = config.get("beta_schedule")
    if shape is None:  # a flow or EDM model: no default fits
        raise ModelError(
            "this scheduler has no beta schedule",
            where="scheduler_config.json",
            fix="Use a model with the noise schedule of SDXL or SD 1.x/2.x.",
        )
    start, end = config["beta_start"], config["beta_end"]
    if shape == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64).square()
    if shape == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    raise ModelError(
        f"beta schedule {shape!r} is not supported",
        where="scheduler_config.json",
        fix="Use scaled_linear, linear or trained_betas.",
    )


def _zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod) so that the last is 0 and the first unchanged (arXiv 2305.08891, alg. 1)."""
    root = alphas_cumprod.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
