"""Trust-PCL in one file: a value network V(x_t, t) gives each step of the chain a target, and so a credit, of its own.

python examples/trust_pcl_loop.py    # ELBO -3.3 -> -1.4, V(x_T) -> log Z = -1.370
"""

import torch

from diffusion_rtb import TrajectoryRecorder, replay, replay_backward
from pipelines.gaussian import Gaussian
from rewards.density import Density

BETA, BATCH, STEPS, ITERATIONS = 1.0, 256, 20, 100

torch.manual_seed(0)
prior = Gaussian([1.0, -2.0], [[2.0, 0.6], [0.6, 0.5]], steps=STEPS)
reward = Density({"mean": [2.0, -1.0], "precision": [[1.0, 0.3], [0.3, 2.0]]})
prior.attach()  # the posterior q: the prior's own network and adapters that start at 0
V = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, STEPS))  # one output for each t
optimizer = torch.optim.AdamW(prior.parameters().values(), lr=0.03, weight_decay=0.0, betas=(0.9, 0.99))
optimizer_v = torch.optim.AdamW(V.parameters(), lr=0.03, weight_decay=0.0, betas=(0.9, 0.99))
schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(each, ITERATIONS) for each in (optimizer, optimizer_v)]
pipe, prompts = prior.pipe, [""] * BATCH
call = prior.arguments(prompts)

for iteration in range(ITERATIONS):
    # 1. rollout, reward and log p, as in rtb_loop.py
    with torch.no_grad(), TrajectoryRecorder(pipe.scheduler, dtype=torch.float64) as recorder:
        pipe(**call, output_type="latent", generator=torch.Generator().manual_seed(iteration))
    trajectory = recorder.trajectory
    r = reward(prior.decode(trajectory.x_0), prompts).double()
    with prior.as_prior():
        log_p = replay(pipe, trajectory, dtype=torch.float64, **call)
    log_ratio = trajectory.log_prob - log_p
    # 2. V by the consistency of x_t with the end of its trajectory: V(x_t) = r - 1/beta · what log q - log p is still to come
    to_come = log_ratio.flip(1).cumsum(1).flip(1)
    x = trajectory.x[:, :-1]
    x = torch.cat([x, x.square(), x.prod(2, keepdim=True)], dim=2)
    for _ in range(5):
        optimizer_v.zero_grad()
        values = V(x).diagonal(dim1=1, dim2=2).double()
        (BETA * (r[:, None] - values) - to_come).square().sum(1).mean().backward()
        optimizer_v.step()
    # 3. q by the consistency of x_t with the state after it: residual = beta·(V(x_s) - V(x_t)) - (log q - log p), V(x_0) = r
    values = torch.cat([values.detach(), r[:, None]], dim=1)
    residual = BETA * (values[:, 1:] - values[:, :-1]) - log_ratio
    # 4. grad of mean 1/2 residual² is -residual · grad log q: backward inside each step
    optimizer.zero_grad()
    replay_backward(pipe, trajectory, -residual / BATCH, **call)
    optimizer.step()
    for schedule in schedules:
        schedule.step()
    if iteration % 10 == 0 or iteration == ITERATIONS - 1:
        elbo, value = (BETA * r - log_ratio.sum(1)).mean(), BETA * values[:, 0].mean()
        print(
            f"{iteration:>3}  reward {r.mean():+.3f}  ELBO {elbo:+.3f}  V(x_T) {value:+.3f}  residual {residual.std():.3f}"
        )
print("log Z", prior.solve(BETA, mean=[2.0, -1.0], precision=[[1.0, 0.3], [0.3, 2.0]]).log_z)
