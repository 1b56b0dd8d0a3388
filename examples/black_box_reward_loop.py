"""Relative trajectory balance for a reward that nobody can differentiate, on a stock diffusers pipeline, in one file.

python examples/black_box_reward_loop.py
"""

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image

from diffusion_rtb import TrajectoryRecorder, replay, replay_backward

BETA, BATCH, ITERATIONS = 8.0, 16, 40


def reward(picture: Image.Image) -> float:
    """The share of dark pixels. Any function of a picture will do: it is called, never differentiated."""
    histogram = picture.convert("L").histogram()
    return sum(histogram[:128]) / sum(histogram)


torch.manual_seed(0)
pipe = StableDiffusionPipeline.from_pretrained("pipelines/emoji/weights", safety_checker=None)
for network in (pipe.unet, pipe.text_encoder, pipe.vae):
    network.requires_grad_(False)
pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["time_emb_proj", "attn1.to_v"]))  # starts at 0
posterior = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(posterior, lr=2e-3, weight_decay=0.0, betas=(0.9, 0.99))
call = {"prompt": ["a cat emoji"] * BATCH, "num_inference_steps": 8, "eta": 1.0, "guidance_scale": 1.0}

for iteration in range(ITERATIONS):
    # 1. rollout: pictures, and x_T, …, x_0 with log q of every transition
    with TrajectoryRecorder(pipe.scheduler, dtype=torch.float64) as recorder:
        pictures = pipe(**call, generator=torch.Generator().manual_seed(iteration)).images
    trajectory = recorder.trajectory
    # 2. reward of the pictures, and log p of the same transitions: the network without its adapters
    r = torch.tensor([reward(picture) for picture in pictures], dtype=torch.float64)
    pipe.unet.disable_adapters()
    log_p = replay(pipe, trajectory, dtype=torch.float64, **call)
    pipe.unet.enable_adapters()
    # 3. residual = log Z - log w, with VarGrad's log Z: all pictures have one prompt
    kl = (trajectory.log_prob - log_p).sum(1)
    log_w = BETA * r - kl
    residual = log_w.mean() - log_w
    # 4. grad of mean 1/2 residual² is residual · grad log q: backward inside each step
    optimizer.zero_grad()
    replay_backward(pipe, trajectory, (residual / BATCH)[:, None].expand_as(log_p), **call)
    optimizer.step()
    print(f"{iteration:>3}  reward {r.mean():.3f}  KL {kl.mean():+.2f} nats  ELBO {log_w.mean():+.2f}")
