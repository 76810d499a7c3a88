"""What patterns share: how a plan is computed. Plain torch, any device, with gradients."""
