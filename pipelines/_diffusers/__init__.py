"""What all families of diffusers pipelines share."""
