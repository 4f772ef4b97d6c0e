"""Compare a step of the particle flow with a training step of nn.Conv2d layers."""
