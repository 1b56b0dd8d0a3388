"""Fine-tune a diffusion model: python train.py configs/quickstart.yaml [key=value ...]."""

from diffusion_rtb.cli.main import train_main

if __name__ == "__main__":
    train_main()
