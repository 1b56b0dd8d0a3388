"""Behaviours: the chains that produce the trajectories an objective is evaluated on, one file each.

A behaviour is orthogonal to the objective. Each is a `Source` of trajectories (`source.py`); a batch is put together from
several (`mixture.py`), and the trainer fills in the log-densities a source does not know.

    file             in a config                     trajectories                                       density they were drawn with
    on_policy        exploration                     the posterior's own, with extra noise that decays   known
    prior_buffer     prior_share, resample, …        the prior's, as they are or by exp(beta·r)          known, unless resampled
    replay           replay: {share, …}              the posterior's of earlier iterations               known, unless by priority
    back_and_forth   back_and_forth: {share, …}      good samples noised back and denoised again         unknown

Objectives with importance weights need that density, on-policy ones take only their own: `training/compatibility.py`
refuses the rest.
`anneal` and `kl_budget` decide beta. A new behaviour is a file here, its section in `config/behaviour.py` and its line in
`mixture.sources`; resuming, logging and refusing follow from these.
"""
