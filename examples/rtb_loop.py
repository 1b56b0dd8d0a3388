"""Relative trajectory balance in one file: the whole algorithm with nothing but the public face, on a prior that is solved.

python examples/rtb_loop.py          # ELBO -3.29 -> -1.42, log Z is -1.370
"""

import torch

from diffusion_rtb import TrajectoryRecorder, replay, replay_backward
from pipelines.gaussian import Gaussian
from rewards.density import Density

BETA, BATCH, ITERATIONS = 1.0, 256, 100

prior = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=20)
reward = Density({"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]})
prior.attach()  # the posterior q: the prior's own network and adapters that start at 0
optimizer = torch.optim.AdamW(prior.parameters().values(), lr=0.03, weight_decay=0.0, betas=(0.9, 0.99))
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
pipe, prompts = prior.pipe, [""] * BATCH
call = prior.arguments(prompts)

for iteration in range(ITERATIONS):
    # 1. rollout: x_T, …, x_0 and log q of every transition, from the stock pipeline
    with torch.no_grad(), TrajectoryRecorder(pipe.scheduler, dtype=torch.float64) as recorder:
        pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(iteration))
    trajectory = recorder.trajectory
    # 2. reward of x_0, and log p of the same transitions
    r = reward(prior.decode(trajectory.x_0), prompts)
    with prior.as_prior():
        log_p = replay(pipe, trajectory, dtype=torch.float64, **call)
    # 3. residual = log Z - log w, with VarGrad's log Z
    log_w = BETA * r - (trajectory.log_prob - log_p).sum(1)
    residual = log_w.mean() - log_w
    # 4. grad of mean 1/2 residual² is residual · grad log q: backward inside each step
    optimizer.zero_grad()
    replay_backward(pipe, trajectory, (residual / BATCH)[:, None].expand_as(log_p), **call)
    optimizer.step()
    schedule.step()
    if iteration % 10 == 0 or iteration == ITERATIONS - 1:
        print(f"{iteration:>3}  reward {r.mean():+.3f}  ELBO {log_w.mean():+.3f}  residual {residual.std():.3f}")
print("log Z", prior.solve(BETA, mean=[2.0, -1.0], precision=[[1.0, 0.3], [0.3, 2.0]]).log_z)
