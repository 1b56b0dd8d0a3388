"""The kinds of subjects, one file each: a class based on `diffusion_rtb.evaluation.subject.Subject`."""
