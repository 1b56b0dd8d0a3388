"""Compare the prior and the posterior of a run: python eval.py RUN [eval.key=value ...]."""

from diffusion_rtb.cli.main import eval_main

if __name__ == "__main__":
    eval_main()
